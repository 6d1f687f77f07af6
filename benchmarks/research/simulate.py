"""Eviction inside a Hugging Face model, without vLLM: whole prompts at once, any score, any state, exact logits.

A causal layer needs nothing of later layers, so one attention call per layer can play all the events of a prompt one after
the other. The page schedule and the scores are the product's own; tests compare its answers with the engine's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from research.states import MomentState, Rounding, State, to_bfloat16, to_int8
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from momentkv_vllm import moments as mo
from momentkv_vllm.attention.head_reach import random_tokens
from momentkv_vllm.attention.sample_text import text_tokens
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels.reference import chosen, fill_holes
from momentkv_vllm.key_centres import centres_of, of_slots, sinks
from momentkv_vllm.key_rounding import feedback_of, moment_of
from momentkv_vllm.packed_store import Packed, PackedLayout
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.policies import Candidates, Policy
from momentkv_vllm.rotation import rotated

MAX_LOGITS = 1 << 25
"""Logits computed at a time (128 MiB): bounds the memory of long segments."""

COVARIANCES: dict[str, tuple[int, Rounding | None]] = {
    "float32": (4, None), "bfloat16": (2, to_bfloat16), "int8": (1, to_int8),
}  # fmt: skip
"""By `moment_dtype`: bytes of a number, and what storing it does to it."""


@dataclass
class Eviction:
    """One way to evict. `state` makes a fresh summary of the evicted tokens, None = no correction.

    prompt_tokens: read in "full" prefill only; the same for all rows.
    store: how the store's tokens are quantised; None: they stay as they are. rounds: their keys by the model's queries;
    then a layer's `feedback` is of errors in them (momentkv_vllm/key_rounding.py).
    """

    policy: Policy
    schedule: PageSchedule
    state: Callable[[], State] | None = None
    sink_tokens: int = 4
    observation_tokens: int = 32
    prompt_tokens: int = 0
    store: PackedLayout | None = None
    rounds: bool = False
    feedback: torch.Tensor | None = None

    @classmethod
    def of(
        cls, config: EvictionConfig, schedule: PageSchedule, prompt_tokens: int = 0, store: PackedLayout | None = None
    ) -> "Eviction":
        """What the engine does with this configuration and the schedule that it makes of it."""
        state = None
        if config.correction != "off":
            order = int(config.correction == "first")
            state = lambda: MomentState(order, *COVARIANCES[config.moment_dtype])  # noqa: E731
        policy = config.policy_class()
        first = sinks(config.sink_tokens, has_centres=store is not None)
        rounds = store is not None and config.key_rounding != "nearest"
        return cls(policy, schedule, state, first, config.observation_tokens, prompt_tokens, store, rounds)


class _Layer:
    """Attention of one layer over whole sequences, event after event.

    stored_k, stored_v: [rows, kv_heads, slots, d] the store; centres: of the keys of a quantised one; window: first token that is
    still exact.
    exact: moments of all evicted tokens, never rounded (of which only the count is kept when nobody needs more).
    mass: [rows, kv_heads, store and window (, 3)] what the policy has observed.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: Eviction
    ) -> None:
        rows, kv_heads, _, _ = key.shape
        self.key, self.value, self.scale, self.how = key, value, scale, how
        self.queries = query.unflatten(1, (kv_heads, -1))
        self.output = torch.empty_like(self.queries)
        self.state = how.state() if how.state else None
        self.covariance = "covariance" in how.policy.reads
        self.exact = mo.of_tokens(key[:, :, :1], value[:, :, :1], torch.zeros(rows, kv_heads, 1), self.covariance)
        self.stored_k, self.stored_v, self.window = key[:, :, :0], value[:, :, :0], 0
        self.centres: torch.Tensor | None = None
        self.evicted = False
        self.mass = torch.zeros(rows, kv_heads, 0, *(how.policy.observes.numbers if how.policy.observes else ()))

    def attend(self) -> torch.Tensor:
        """[rows, num_heads, tokens, d]."""
        plan, start, tokens = self.how.schedule, 0, self.key.shape[2]
        while start < tokens:
            event = plan.next_event(start, self.how.prompt_tokens)
            end = min(tokens, event)
            k = torch.cat([self.stored_k, self.key[:, :, self.window : end]], 2)
            v = torch.cat([self.stored_v, self.value[:, :, self.window : end]], 2)
            self._segment(start, end, event, k, v)
            if end == event:
                self._retire(event, k, v)
            start = end
        return self.output.flatten(1, 2)

    def _segment(self, start: int, end: int, event: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Queries [start, end), which see the same store; `event` comes after them, and perhaps after the sequence."""
        policy, zone = self.how.policy, end
        if policy.observes is not None:
            zone = start if policy.observes_every_query() else max(start, event - self.how.observation_tokens)
            # Slots of an unfinished page keep what they had: the window's part of `mass` grows with it.
            new = self.mass.new_zeros(*self.mass.shape[:2], k.shape[2] - self.mass.shape[2], *self.mass.shape[3:])
            self.mass = torch.cat([self.mass, new], 2)
        first = start
        if not self.stored_k.shape[2]:
            self.output[:, :, :, start:end] = exact_attention(
                self.queries[:, :, :, start:end].flatten(1, 2), k, v, self.scale
            ).unflatten(1, self.queries.shape[1:3])
            first = min(zone, end)
        rows, kv_heads, groups = self.queries.shape[:3]
        most = max(1, MAX_LOGITS // (rows * kv_heads * groups * k.shape[2]))
        for at in range(first, end, most):
            self._queries(at, min(end, at + most), zone, k, v)

    def _queries(self, first: int, last: int, zone: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Queries [first, last); those from `zone` on are observed."""
        grouped = self.queries[:, :, :, first:last].flatten(2, 3)
        logits = grouped @ k.transpose(-1, -2) * self.scale
        slots = self.stored_k.shape[2]
        positions = torch.cat([torch.full((slots,), -1), torch.arange(k.shape[2] - slots) + self.window])
        hidden = (positions > torch.arange(first, last).unsqueeze(-1)).repeat(self.queries.shape[2], 1)
        logits.masked_fill_(hidden, -torch.inf)
        total = logits.logsumexp(-1)
        if self.state is not None and self.evicted:
            evicted, log_mass = self.state.partial(grouped, self.scale)
            total = torch.logaddexp(total, log_mass)
        weight = (logits - total.unsqueeze(-1)).exp()
        result = weight @ v
        if self.state is not None and self.evicted:
            result += (log_mass - total).exp().unsqueeze(-1) * evicted
        self.output[:, :, :, first:last] = result.unflatten(2, (-1, last - first))
        if zone < last:
            seen = weight
            if self.how.policy.observes.what == "logits":
                visible = torch.where(hidden, 0.0, logits)
                seen = torch.stack([(~hidden).float().expand_as(logits), visible, visible.square()], -1)
            self.mass += seen.unflatten(2, (-1, last - first))[:, :, :, max(0, zone - first) :].sum((2, 3))

    def _retire(self, event: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The event: tokens before the new boundary compete for the store, losers join the moments."""
        how, plan, policy = self.how, self.how.schedule, self.how.policy
        boundary = plan.boundary_column(event, how.prompt_tokens) * plan.page_size
        num = self.stored_k.shape[2] + boundary - self.window
        keys, values = self._entering(k[:, :, :num], v[:, :, :num])
        if num <= plan.store_tokens:
            self._keep(keys, values, boundary)
            return
        tokens = Candidates(
            keys=k[:, :, :num], values=v[:, :, :num], valid=torch.ones(k.shape[0], num, dtype=torch.bool),
            store_tokens=plan.store_tokens, moments=self.exact, scale=self.scale,
            attention=self.mass[:, :, :num] if policy.observes is not None else None,
            run_tokens=plan.run_tokens,
        )  # fmt: skip
        kept = chosen(policy.score(tokens), tokens.valid, plan.store_tokens, plan.run_tokens, how.sink_tokens)
        self._forget(tokens, (~kept).float())
        # Pages become a quantised store in order; a 16-bit store begins as the pages that it is made of.
        filled = plan.store_tokens if how.store is None else self.stored_k.shape[2]
        source = fill_holes(kept, torch.full((k.shape[0],), filled), plan.store_tokens)
        pick = source.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        if policy.observes_every_query():
            self.mass = torch.cat([self.mass[:, :, :num].gather(2, source), self.mass[:, :, num:]], 2)
        self._keep(keys.gather(2, pick), values.gather(2, pick), boundary)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, boundary: int) -> None:
        self.stored_k, self.stored_v, self.window = keys, values, boundary
        if not self.how.policy.observes_every_query():
            self.mass = self.mass.new_zeros(*self.mass.shape[:2], 0, *self.mass.shape[3:])

    def _entering(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidates as the store will hold them: those that are not in it yet are quantised."""
        old, layout = self.stored_k.shape[2], self.how.store
        if layout is None:
            return keys, values
        if self.centres is None:
            self.centres = centres_of(keys, torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool))
        centres = of_slots(self.centres, keys.shape[2])[:, :, old:]
        k, v = as_stored(keys[:, :, old:], values[:, :, old:], centres, layout, self.how.feedback)
        return torch.cat([keys[:, :, :old], k], 2), torch.cat([values[:, :, :old], v], 2)

    def _forget(self, tokens: Candidates, lost: torch.Tensor) -> None:
        self.evicted = True
        if "means" not in self.how.policy.reads and self.state is None:
            self.exact = replace(self.exact, count=self.exact.count + lost[:, 0].sum(-1))
            return
        # As many of every head: only they are read.
        gone = lost.argsort(dim=-1, descending=True, stable=True)[..., : int(lost[0, 0].sum())]
        pick = gone.unsqueeze(-1).expand(-1, -1, -1, tokens.keys.shape[-1])
        keys, values, lost = tokens.keys.gather(2, pick), tokens.values.gather(2, pick), lost.gather(2, gone)
        if self.state is not None:
            self.state.absorb(keys, values, lost, self.exact)
        self.exact = mo.merge(self.exact, mo.of_tokens(keys, values, lost, self.covariance))


def as_stored(
    keys: torch.Tensor,
    values: torch.Tensor,
    centres: torch.Tensor,
    layout: PackedLayout,
    feedback: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [rows, heads, tokens, d] as a quantised store holds them; centres: of the keys, like them; feedback: of
    errors in keys."""
    numbers = Packed.of(keys - centres, values, layout, feedback).numbers(layout)
    k, v = (rotated(x)[..., : keys.shape[-1]] for x in numbers)
    return k + centres, v


def evicting_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: Eviction
) -> torch.Tensor:
    """Causal attention of a whole sequence under eviction.

    Args:
        query: [rows, num_heads, tokens, head_dim] float32; key, value: [rows, num_kv_heads, tokens, head_dim].

    Returns:
        [rows, num_heads, tokens, head_dim].
    """
    return _Layer(query, key, value, scale, how).attend()


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention with all tokens kept; shapes as above."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


@dataclass
class Rounded:
    """All tokens kept, in fewer bits. `bits`: of one number, scales included."""

    rounding: Rounding
    bits: float


@dataclass
class SimulatedModel:
    """A checkpoint whose attention evicts. `layer_errors` collects |output - exact| / |exact| of every layer call."""

    path: Path | str
    how: Eviction | Rounded | None = None
    measure_errors: bool = False
    layer_errors: list[float] = field(default_factory=list)
    moments: dict[int, torch.Tensor] | None = None
    """While `feedback` is measured: of queries, by layer."""

    def __post_init__(self) -> None:
        # The registry is global: a name a model.
        name = f"momentkv_simulated_{id(self)}"
        AttentionInterface.register(name, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, attn_implementation=name)

    @cached_property
    def feedback(self) -> list[torch.Tensor]:
        """By layer, of its keys' errors, as the worker measures it (momentkv_vllm/attention/measuring.py)."""
        config, self.moments = self.model.config, {}
        known = (Path(self.path) / "tokenizer.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(self.path) if known else None
        ids = text_tokens(tokenizer, config.max_position_embeddings)
        ids = random_tokens(config.vocab_size, config.max_position_embeddings) if ids is None else ids
        how, self.how = self.how, None
        with torch.no_grad():
            self.model.model(ids[None], use_cache=False)
        self.how, moments, self.moments = how, self.moments, None
        # As wide as a quantised key: the rotation of a dimension is the same for any store.
        width = PackedLayout("int4", next(iter(moments.values())).shape[-1]).width
        return [feedback_of(moments[layer], width) for layer in sorted(moments)]

    def _attention(self, module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
        output = exact = None
        if self.moments is not None:
            self.moments[module.layer_idx] = moment_of(query[0].transpose(0, 1), key.shape[1])
        if self.how is None or self.measure_errors:
            output = exact = exact_attention(query, key, value, scaling)
        if isinstance(self.how, Rounded):
            output = exact_attention(query, self.how.rounding(key), self.how.rounding(value), scaling)
        elif self.how is not None:
            how = replace(self.how, feedback=self.feedback[module.layer_idx]) if self.how.rounds else self.how
            output = evicting_attention(query, key, value, scaling, how)
        if self.measure_errors and self.how is not None:
            # What the layer returns stays exact, so that a layer's error is its own.
            last = slice(query.shape[2] // 2, None)
            error = (output - exact)[:, :, last].norm(dim=-1) / exact[:, :, last].norm(dim=-1)
            self.layer_errors.append(error.mean().item())
            output = exact
        return output.transpose(1, 2), None

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, how: Eviction | Rounded | None) -> torch.Tensor:
        """What goes into the output layer, [rows, tokens, hidden]."""
        self.how = how
        return self.model.model(ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def log_probs(self, ids: torch.Tensor, places: slice, how: Eviction | Rounded | None) -> torch.Tensor:
        """Next-token log-probabilities [rows, places, vocabulary] after every token of ids[:, places]."""
        return self.model.lm_head(self.hidden(ids, how)[:, places]).float().log_softmax(-1)
