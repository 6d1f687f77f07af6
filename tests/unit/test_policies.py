"""What each policy's score says, on cases small enough to know the answer."""

from dataclasses import replace

import pytest
import torch

from momentkv_vllm import moments
from momentkv_vllm.policies import Candidates, find, names
from momentkv_vllm.policies.key_direction import ATTENTION_WEIGHT, FEW_RUNS, WEIGHT_OF_FEW, attention_weight

ROWS, HEADS, TOKENS, DIM = 2, 3, 32, 16


def candidates(count=0.0, **changes):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(ROWS, HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    gone = moments.of_tokens(keys.flip(2), values, torch.ones(ROWS, HEADS, TOKENS), True)
    gone.count = torch.full((ROWS,), count)
    attention = torch.rand(ROWS, HEADS, TOKENS, generator=generator)
    given = {"keys": keys, "values": values, "valid": torch.ones(ROWS, TOKENS, dtype=torch.bool), "store_tokens": 16}
    return Candidates(**{**given, "moments": gone, "attention": attention, "scale": 0.25, **changes})


def score(policy, tokens):
    """A policy that observes logits gets their count, sum and sum of squares made from the attention."""
    observes = find(policy).observes
    if observes and observes.what == "logits" and tokens.attention.dim() == 3:
        x = tokens.attention
        tokens = replace(tokens, attention=torch.stack([torch.full_like(x, 4.0), 4 * x, 4 * x.square() + 1], -1))
    return find(policy)().score(tokens)


def order(policy, tokens):
    return score(policy, tokens).argsort(-1, descending=True)


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("count", [0.0, 100.0])
def test_scores_are_finite_and_leave_the_candidates_alone(policy, count):
    tokens = candidates(count)
    before = [x.clone() for x in (tokens.keys, tokens.values, tokens.attention)]
    result = score(policy, tokens)
    assert result.shape == (ROWS, HEADS, TOKENS) and result.isfinite().all()
    result.fill_(7.0)  # the caller protects sinks in place
    for was, now in zip(before, (tokens.keys, tokens.values, tokens.attention), strict=True):
        assert torch.equal(was, now)


def test_observed_padding_does_not_change_the_default_score():
    tokens = candidates()
    pad = torch.zeros(ROWS, HEADS, 16, DIM)
    padded = candidates(
        keys=torch.cat([tokens.keys, pad], 2), values=torch.cat([tokens.values, pad], 2),
        valid=torch.cat([tokens.valid, torch.zeros(ROWS, 16, dtype=torch.bool)], 1),
        attention=torch.cat([tokens.attention, torch.ones(ROWS, HEADS, 16)], 2),
    )  # fmt: skip
    torch.testing.assert_close(score("momentkv", padded)[..., :TOKENS], score("momentkv", tokens))


def test_knorm_keeps_short_keys():
    tokens = candidates()
    assert torch.equal(order("knorm", tokens), tokens.keys.square().sum(-1).argsort(-1))


def test_keydiff_and_momentkv_keep_the_odd_one_out():
    keys = torch.randn(DIM).expand(ROWS, HEADS, TOKENS, DIM) + 0.01 * torch.randn(ROWS, HEADS, TOKENS, DIM)
    keys[:, :, 21] *= -1
    for policy in ("keydiff", "momentkv"):
        assert (order(policy, candidates(keys=keys))[..., 0] == 21).all(), policy


def test_attention_policies_keep_what_was_attended():
    tokens = candidates(100.0)
    for policy in ("h2o", "tova", "snapkv"):
        assert torch.equal(order(policy, tokens), tokens.attention.argsort(-1, descending=True)), policy


def test_snapkv_lifts_the_neighbours_of_an_attended_token_at_the_first_event():
    attention = torch.zeros(ROWS, HEADS, TOKENS)
    attention[..., 12] = 1.0
    assert set(order("snapkv", candidates(attention=attention))[0, 0, :5].tolist()) == {10, 11, 12, 13, 14}


def test_random_keeps_a_uniform_sample_of_the_past():
    """The positions that survive 60 events of 16 tokens: as many old as new ones, and every head its own."""
    heads, store, retire, events = 64, 64, 16, 60
    held = torch.arange(store).expand(heads, -1)
    for event in range(events):
        new = store + retire * event + torch.arange(retire).expand(heads, -1)
        all_of = torch.cat([held, new], 1)
        keys = torch.zeros(1, heads, store + retire, DIM)
        gone = moments.Moments(
            torch.tensor([float(retire * event)]), keys[:, :, 0], keys[:, :, 0], keys[:, :, 0, 0], None
        )
        tokens = candidates(keys=keys, moments=gone, store_tokens=store)
        held = all_of.gather(1, find("random")().score(tokens)[0].topk(store, -1).indices)
    total = store + retire * events
    assert abs(held.float().mean() / total - 0.5) < 0.02  # standard error 0.0045
    assert abs(held.float().std() / total - 12**-0.5) < 0.02
    assert len({tuple(h) for h in held.tolist()}) == heads


def test_expected_attention_is_the_mean_of_the_exponential_for_gaussian_logits():
    logits = 0.7 * torch.randn(200_000, generator=torch.Generator().manual_seed(2)) + 0.3
    seen = torch.stack([torch.tensor(200_000.0), logits.sum(), logits.square().sum()]).expand(ROWS, HEADS, TOKENS, 3)
    tokens = candidates(attention=seen)
    want = logits.exp().mean().log() + tokens.values.norm(dim=-1).log()
    torch.testing.assert_close(score("expected_attention", tokens), want, atol=0.02, rtol=0)


def test_attention_counts_less_in_a_store_of_few_runs():
    """No more than queries are observed. Runs count, not tokens."""
    few = candidates(store_tokens=8 * FEW_RUNS, run_tokens=8)
    more, single = replace(few, store_tokens=8 * FEW_RUNS + 8), replace(few, run_tokens=1)
    keys = score("keydiff", few)
    asked = score("momentkv", more) - keys
    assert asked.min() > 0
    torch.testing.assert_close(score("momentkv", few) - keys, asked * WEIGHT_OF_FEW / ATTENTION_WEIGHT)
    assert torch.equal(score("momentkv", single), score("momentkv", more))


@pytest.mark.parametrize(("runs", "weight"), [(FEW_RUNS, WEIGHT_OF_FEW), (FEW_RUNS + 1, ATTENTION_WEIGHT)])
@pytest.mark.parametrize("run_tokens", [1, 8, 16])
def test_kernels_are_told_the_weight_of_the_store(runs, weight, run_tokens):
    assert attention_weight(find("momentkv"), runs * run_tokens, run_tokens) == weight
    assert attention_weight(find("keydiff"), runs * run_tokens, run_tokens) == 0
