"""consolidate, first part: who stays and who goes."""

import triton
import triton.language as tl


@triton.jit
def _relative(x, real, candidates):
    """x over its mean; a NaN stays one, but does not count in the mean."""
    mean = tl.sum(tl.sum(tl.where(real & (x == x), x, 0.0), 1), 0) / candidates
    return x / tl.maximum(mean, 1e-30)


@triton.jit
def _lost(score, real, losers):
    """[N] True for the `losers` that go: lowest score first, of equal scores the later, NaN as -inf."""
    score = tl.where(score == score, score, float("-inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 becomes +0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # sorts as the floats do
    key = tl.where(real, key, 0x7FFFFFFF)
    low = tl.full((), -0x80000000, tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((key <= middle).to(tl.int32), 0) >= losers
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    below = key < low
    tied = (key == low) & real
    missing = losers - tl.sum(below.to(tl.int32), 0)
    later = tl.sum(tied.to(tl.int32), 0) - tl.cumsum(tied.to(tl.int32), 0)
    return below | (tied & (later < missing))


@triton.jit
def _listed(list_at, i, chosen, RUN: tl.constexpr):
    """Writes the tokens i [runs, RUN] of chosen runs into a list, in order; returns how many."""
    place = (tl.cumsum(chosen.to(tl.int32), 0) - 1)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(list_at + place, i, mask=chosen[:, None])
    return tl.sum(chosen.to(tl.int32), 0) * RUN


@triton.jit
def choose(
    score, term, event, sink_tokens, attention_weight, loser_list, winner_list,
    RUNS: tl.constexpr, RUN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Lists who goes and which tokens outside of the store stay, in order; returns (how many slots of the store that leaves
    empty, how many tokens want one). RUN neighbours go together, by their mean score; candidates are whole runs.

    TERMS: of the native score that lie `term` numbers apart (score.py); 0: `score` is one.
    """
    run = tl.arange(0, RUNS)
    i = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    real = i < event.candidates
    x = tl.load(score + i, mask=real, other=0.0)
    if TERMS > 0:
        x = _relative(x, real, event.candidates)
    if TERMS > 1:
        asked = tl.load(score + term + i, mask=real, other=0.0)
        x += attention_weight * _relative(asked, real, event.candidates)
    means = tl.where(run * RUN < sink_tokens, float("inf"), tl.sum(x, 1) / RUN)
    real_run = run * RUN < event.candidates
    lost = _lost(means, real_run, event.losers // RUN)
    in_store = run * RUN < event.filled
    _listed(loser_list, i, lost, RUN)
    winners = _listed(winner_list, i, real_run & (lost == 0) & (in_store == 0), RUN)
    return tl.sum((lost & in_store).to(tl.int32), 0) * RUN, winners
