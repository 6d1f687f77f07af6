"""`check_policy`: what every eviction policy must keep to, for the tests of whoever writes one (docs/policies.md)."""

from dataclasses import fields, replace
from typing import Any

import torch

from momentkv_vllm import moments as mo
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.moments import Moments
from momentkv_vllm.policies import Candidates, Policy
from momentkv_vllm.policies.base import objections
from momentkv_vllm.policies.key_direction import attention_weight, key_direction

COUNTS = (0.0, 100.0, 37.0)
"""Evicted tokens of each row: the first row is at its first event."""
HEADS, STORE, RETIRING, PAGE, HEAD_DIM = 3, 32, 16, 16, 20
NAN = float("nan")


def check_policy(policy: type[Policy]) -> None:
    """Raises AssertionError with the first rule that `policy` breaks: what follows, in this order."""
    _check_declarations(policy)
    tokens = candidates(policy)
    try:
        result = policy().score(tokens)
    except Exception as error:
        raise AssertionError(
            f"{policy.name}: score raises {type(error).__name__}: {error} (attention is None unless `observes` says what it is, "
            f"the covariance is unless `reads` names it)"
        ) from error
    _check_result(policy, tokens, result)
    _check_independence(policy, tokens, result)
    if "order" not in policy.reads:
        order = torch.randperm(STORE + RETIRING, generator=torch.Generator().manual_seed(1))
        moved = policy().score(_each(tokens, lambda x: x[:, :, order], per_head=False))
        _same(policy, "a token's score changes with its place; declare 'order' in reads", moved, result[:, :, order])
    if policy.keeps_only_sinks:
        kept = result[:, :, :STORE].amin(-1) >= result[:, :, STORE:].amax(-1)
        assert kept.all(), f"{policy.name}: keeps_only_sinks, but a retiring token scores higher than one of the store"
    if policy.native == "key_direction":
        native = key_direction(tokens, attention_weight(policy, tokens.store_tokens, tokens.run_tokens))
        _same(policy, "native: its score is not what the kernels compute", result, native)


def candidates(policy: type[Policy], seed: int = 0) -> Candidates:
    """Random ones, with what `policy` declares and NaN or None in place of the rest."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> torch.Tensor:
        return torch.randn(len(COUNTS), HEADS, STORE + RETIRING, HEAD_DIM, generator=generator)

    keys, values = drawn(), drawn()
    reads_covariance = "covariance" in policy.reads
    gone = mo.of_tokens(drawn(), drawn(), torch.ones(keys.shape[:3]), reads_covariance)
    gone.count = torch.tensor(COUNTS)
    for name in ("mean_key", "mean_value", "value_spread", "covariance"):
        tensor = getattr(gone, name)
        if tensor is not None:
            # Without 'means' in reads there may be no record; before a first event there is none.
            tensor[: 1 if "means" in policy.reads or reads_covariance else None] = NAN
    valid = torch.ones(len(COUNTS), STORE + RETIRING, dtype=torch.bool)
    return Candidates(keys, values, valid, STORE, gone, _attention(policy, keys, generator), HEAD_DIM**-0.5)


def _attention(policy: type[Policy], keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    if policy.observes is None:
        return None
    mass = torch.rand(keys.shape[:3], generator=generator)
    if policy.observes.what == "mass":
        return mass
    # Four logits of mean `mass` and variance 1 / 4.
    return torch.stack([torch.full_like(mass, 4.0), 4 * mass, 4 * mass.square() + 1], -1)


def _check_declarations(policy: type[Policy]) -> None:
    wrong = objections(policy)
    assert not wrong, f"{policy!r}: {'; '.join(wrong)}"
    try:
        EvictionConfig(**policy.defaults)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{policy.name}: its defaults are no legal configuration: {error}") from error


def _check_result(policy: type[Policy], tokens: Candidates, result: torch.Tensor) -> None:
    """Shape, type and finite numbers; the candidates stay as they are, also when the caller writes into the result; again, the
    same."""
    assert result.shape == tokens.keys.shape[:3], f"{policy.name}: {tuple(result.shape)} is not [rows, heads, tokens]"
    assert result.dtype == torch.float32, f"{policy.name}: scores are {result.dtype}, not float32"
    assert result.isfinite().all(), (
        f"{policy.name}: a score is not finite; it may read moments where count is 0, or those that `reads` does not declare"
    )
    before, again = candidates(policy), policy().score(tokens)
    _same(policy, "the same candidates get other scores when asked again", again, result, exactly=True)
    again.fill_(7.0)
    for one, other in zip(_tensors(tokens), _tensors(before), strict=True):
        _same(policy, "score changes its candidates, or returns one of them", one, other, exactly=True)


def _check_independence(policy: type[Policy], tokens: Candidates, result: torch.Tensor) -> None:
    """A row's scores do not depend on other rows, nor on padding, nor a head's on other heads."""
    for row in range(len(COUNTS)):
        alone = policy().score(_each(tokens, lambda x, row=row: x[row : row + 1], per_row=True))
        _same(policy, "a request's scores depend on the others of its batch", alone, result[row : row + 1])
    pad = _each(tokens, lambda x: torch.cat([x, torch.zeros_like(x[:, :, :PAGE])], 2), per_head=False)
    pad = replace(pad, valid=torch.cat([tokens.valid, torch.zeros_like(tokens.valid[:, :PAGE])], 1))
    _same(policy, "padding changes scores; use tokens.valid", policy().score(pad)[:, :, : STORE + RETIRING], result)
    if "head" in policy.reads:
        return
    for head in range(HEADS):
        alone = policy().score(_each(tokens, lambda x, head=head: x[:, head : head + 1]))
        _same(
            policy, "a head's scores depend on other heads, which tensor parallel workers do not see (or on its number: "
            "declare 'head' in reads)", alone, result[:, head : head + 1],
        )  # fmt: skip


def _each(tokens: Candidates, change: Any, per_head: bool = True, per_row: bool = False) -> Candidates:
    """`change` applied to keys, values and attention; `per_head`: to the moments of heads too; `per_row`: to everything."""
    gone, seen = tokens.moments, tokens.attention
    if per_head:
        named = {f.name: getattr(gone, f.name) for f in fields(Moments) if per_row or f.name != "count"}
        gone = replace(gone, **{name: change(x) for name, x in named.items() if x is not None})
    return replace(
        tokens, keys=change(tokens.keys), values=change(tokens.values), moments=gone,
        attention=None if seen is None else change(seen), valid=change(tokens.valid) if per_row else tokens.valid,
    )  # fmt: skip


def _tensors(tokens: Candidates) -> list[torch.Tensor]:
    gone = [getattr(tokens.moments, f.name) for f in fields(Moments)]
    return [x for x in (tokens.keys, tokens.values, tokens.valid, tokens.attention, *gone) if x is not None]


def _same(policy: type[Policy], rule: str, one: torch.Tensor, other: torch.Tensor, exactly: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exactly else {}
    torch.testing.assert_close(
        one, other, equal_nan=True, msg=lambda found: f"{policy.name}: {rule}: {found}", **tolerance
    )
