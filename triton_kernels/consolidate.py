"""consolidate: choose the losers, fold them into the record, fill their slots. One program a (row, KV head).

Three barriers order what may share memory: the lists before they are read, losers read before winners move over them, and
winners read before the record is written, which at a sequence's first event lies in retiring pages.
"""

import torch
import triton
import triton.language as tl

from .arguments import record_sizes, records_of, sizes, tokens_of
from .common import covariance_rows, dot, float_at, narrow, program_head
from .score import candidate_page, load_keys, load_values, retiring_pages_of, score_terms

BLOCK_L = 16
"""Losers folded at a time."""


@triton.jit
def _relative(x, real, candidates):
    """x over its mean; a NaN stays one, but does not count in the mean."""
    mean = tl.sum(tl.where(real & (x == x), x, 0.0), 0) / candidates
    return x / tl.maximum(mean, 1e-30)


@triton.jit
def _losers(score, candidate, real, losers):
    """[N] True for the `losers` candidates that go: lowest score first, of equal scores the later, NaN as -inf."""
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
def _choose(
    score, term, c, store_tokens, candidates, losers, sink_tokens, attention_weight, loser_list, winner_list,
    IS_TERMS: tl.constexpr,
):  # fmt: skip
    """Lists who goes and which retiring tokens stay, in order; returns how many store slots that leaves empty."""
    real = c < candidates
    if IS_TERMS:
        far = tl.load(score + c, mask=real, other=0.0)
        asked = tl.load(score + term + c, mask=real, other=0.0)
        x = _relative(far, real, candidates) + attention_weight * _relative(asked, real, candidates)
    else:
        x = tl.load(score + c, mask=real, other=0.0)
    lost = _losers(tl.where(c < sink_tokens, float("inf"), x), c, real, losers)
    won = real & (lost == 0) & (c >= store_tokens)
    tl.store(loser_list + tl.cumsum(lost.to(tl.int32), 0) - 1, c, mask=lost)
    tl.store(winner_list + tl.cumsum(won.to(tl.int32), 0) - 1, c, mask=won)
    return tl.sum((lost & (c < store_tokens)).to(tl.int32), 0)


@triton.jit
def _fold(
    tokens, head, store, retiring, loser_list, losers, store_tokens,
    BLOCK_L: tl.constexpr, SIZES: tl.constexpr, HAS_COVARIANCE: tl.constexpr,
):  # fmt: skip
    """Mean key and value [D], value spread and covariance [D, D] of the losers: means, then what is centred (two passes: no
    cancellation)."""
    D: tl.constexpr = SIZES.block_d
    mean_key = tl.zeros((D,), tl.float32)
    mean_value = tl.zeros((D,), tl.float32)
    for first in range(0, losers, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        i = tl.load(loser_list + j, mask=j < losers, other=0)
        page = candidate_page(store, retiring, i, j < losers, store_tokens, SIZES.page)
        mean_key += tl.sum(load_keys(tokens, head, page, i % SIZES.page, j < losers, SIZES), 0)
        mean_value += tl.sum(load_values(tokens, head, page, i % SIZES.page, j < losers, SIZES), 0)
    mean_key /= losers
    mean_value /= losers
    squares = tl.zeros((D,), tl.float32)
    product = tl.zeros((D, D) if HAS_COVARIANCE else (1, 1), tl.float32)
    for first in range(0, losers, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        i = tl.load(loser_list + j, mask=j < losers, other=0)
        page = candidate_page(store, retiring, i, j < losers, store_tokens, SIZES.page)
        dv = load_values(tokens, head, page, i % SIZES.page, j < losers, SIZES)
        dv = tl.where((j < losers)[:, None], dv - mean_value[None, :], 0.0)
        squares += tl.sum(dv * dv, 0)
        if HAS_COVARIANCE:
            dk = load_keys(tokens, head, page, i % SIZES.page, j < losers, SIZES)
            dk = tl.where((j < losers)[:, None], dk - mean_key[None, :], 0.0)
            product += dot(tl.trans(dk), dv)
    return mean_key, mean_value, tl.sum(squares, 0) / losers, product / losers


@triton.jit
def _merged(
    records, head, pages, before, losers, mean_key, mean_value, spread, covariance,
    SIZES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """The moments of record and losers together (Chan et al. 1979). Nothing of an empty record counts: its pages hold tokens."""
    d = tl.arange(0, SIZES.block_d)
    real = d < SIZES.head_dim
    old = d < tl.where(before > 0, SIZES.head_dim, 0)
    share = losers / (before + losers)
    between = share * (1 - share)
    old_key = tl.load(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mask=old, other=0.0)
    old_value = tl.load(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mask=old, other=0.0)
    delta_key = tl.where(old, mean_key - old_key, 0.0)
    delta_value = tl.where(old, mean_value - old_value, 0.0)
    old_spread = tl.load(float_at(records, head, pages, RECORD.spread, True, RECORD))
    mixed = old_spread + share * (spread - old_spread) + between * tl.sum(delta_value * delta_value, 0)
    spread = tl.where(before > 0, mixed, spread)
    mean_key -= (1 - share) * delta_key
    mean_value -= (1 - share) * delta_value
    if RECORD.has_covariance:
        at = covariance_rows(records, head, pages, d, real, SIZES, RECORD) + d[None, :]
        c_old = tl.load(at, mask=old[:, None] & real[None, :], other=0).to(tl.float32)
        if RECORD.has_scales:
            scales = tl.load(float_at(records, head, pages, RECORD.scales + d, real, RECORD), mask=old, other=0.0)
            c_old *= scales[:, None]
        mixed_c = c_old + share * (covariance - c_old) + between * delta_key[:, None] * delta_value[None, :]
        covariance = tl.where(before > 0, mixed_c, covariance)
    return mean_key, mean_value, spread, covariance


@triton.jit
def _write_record(
    records, head, pages, mean_key, mean_value, spread, covariance, SIZES: tl.constexpr, RECORD: tl.constexpr
):
    """covariance [D (key), D (value)] is rounded to the record's type; int8: a row's largest number becomes 127."""
    d = tl.arange(0, SIZES.block_d)
    real = d < SIZES.head_dim
    tl.store(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mean_key, mask=real)
    tl.store(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mean_value, mask=real)
    tl.store(float_at(records, head, pages, RECORD.spread, True, RECORD), spread)
    if RECORD.has_covariance:
        if RECORD.has_scales:
            scale = tl.max(tl.abs(covariance), 1) / 127
            tl.store(float_at(records, head, pages, RECORD.scales + d, real, RECORD), scale, mask=real)
            covariance = tl.floor(covariance / tl.maximum(scale, 1.2e-38)[:, None] + 0.5)
        at = covariance_rows(records, head, pages, d, real, SIZES, RECORD) + d[None, :]
        tl.store(at, narrow(covariance, records.covariance.dtype.element_ty), mask=real[:, None] & real[None, :])


@triton.jit
def _fill_holes(
    tokens, head, store, retiring, loser_list, winner_list, holes, store_tokens, mass, m_page,
    BLOCK_L: tl.constexpr, HAS_MASS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """The i-th lost store slot takes the i-th retiring token that stays."""
    d = tl.arange(0, SIZES.block_d)
    keys, values = tokens.k + head * tokens.k_head, tokens.v + head * tokens.v_head
    k_dim, v_dim = (d * tokens.k_dim)[None, :], (d * tokens.v_dim)[None, :]
    for first in range(0, holes, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        ok = j < holes
        to, source = tl.load(loser_list + j, mask=ok, other=0), tl.load(winner_list + j, mask=ok, other=0)
        to_page = candidate_page(store, retiring, to, ok, store_tokens, SIZES.page)
        page = candidate_page(store, retiring, source, ok, store_tokens, SIZES.page)
        tile = ok[:, None] & (d < SIZES.head_dim)[None, :]
        slot, to_slot = source % SIZES.page, to % SIZES.page
        k = tl.load(keys + (page * tokens.k_page + slot * tokens.k_slot)[:, None] + k_dim, mask=tile)
        v = tl.load(values + (page * tokens.v_page + slot * tokens.v_slot)[:, None] + v_dim, mask=tile)
        tl.store(keys + (to_page * tokens.k_page + to_slot * tokens.k_slot)[:, None] + k_dim, k, mask=tile)
        tl.store(values + (to_page * tokens.v_page + to_slot * tokens.v_slot)[:, None] + v_dim, v, mask=tile)
        if HAS_MASS:
            seen = tl.load(mass + page * m_page + slot, mask=ok)
            tl.store(mass + to_page * m_page + to_slot, seen, mask=ok)


@triton.jit
def _consolidate(
    score, mass, loser_list, winner_list, store, retiring, moment_pages, num_evicted, tokens, records,
    s_row, s_head, s_term, l_row, l_head, m_page, m_head, row_store, row_retiring, row_moments,
    store_tokens, num_retiring, sink_tokens, attention_weight,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, IS_TERMS: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_MEANS: tl.constexpr, SIZES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head): choose, fold, fill, write the record, a barrier between each."""
    row, head = tl.program_id(0), program_head()
    store += row * row_store
    retiring += row * row_retiring
    due = retiring_pages_of(retiring, num_retiring, BLOCK_K)
    if due == 0:
        return
    losers = due * SIZES.page
    loser_list += row * l_row + head * l_head
    winner_list += row * l_row + head * l_head
    holes = _choose(
        score + row * s_row + head * s_head, s_term, tl.arange(0, BLOCK_C), store_tokens, store_tokens + losers, losers,
        sink_tokens, attention_weight, loser_list, winner_list, IS_TERMS,
    )  # fmt: skip
    tl.debug_barrier()
    pages = moment_pages + row * row_moments
    if HAS_MEANS:
        mean_key, mean_value, spread, covariance = _fold(
            tokens, head, store, retiring, loser_list, losers, store_tokens, BLOCK_L, SIZES, RECORD.has_covariance
        )
        before = tl.load(num_evicted + row)
        mean_key, mean_value, spread, covariance = _merged(
            records, head, pages, before, losers, mean_key, mean_value, spread, covariance, SIZES, RECORD
        )
    tl.debug_barrier()
    _fill_holes(
        tokens, head, store, retiring, loser_list, winner_list, holes, store_tokens, mass + head * m_head, m_page,
        BLOCK_L, HAS_MASS, SIZES,
    )  # fmt: skip
    tl.debug_barrier()
    if HAS_MEANS:
        _write_record(records, head, pages, mean_key, mean_value, spread, covariance, SIZES, RECORD)


def consolidate(cache, mass, work, score, sink_tokens: int, attention_weight: float) -> None:
    """As kernels/base.py.

    Args:
        mass: [num_pages, num_kv_heads, page_size] float32 observed attention, which moves along with the tokens; or None.
        score: [rows, heads, candidates] float32 of any policy; None: momentkv's, from `mass` and `attention_weight`.
    """
    rows, heads = len(work.num_evicted), cache.keys.shape[1]
    num_retiring = work.retiring_pages.shape[1]
    if num_retiring == 0:
        return
    store_tokens = work.store_pages.shape[1] * cache.page_size
    most = store_tokens + num_retiring * cache.page_size
    terms = score_terms(cache, mass, work) if score is None else score.unsqueeze(2)
    lists = torch.empty(2, rows, heads, num_retiring * cache.page_size, dtype=torch.int32, device=cache.keys.device)
    moved = mass if mass is not None else terms
    _consolidate[(rows, heads)](
        terms, moved, lists[0], lists[1], work.store_pages, work.retiring_pages, work.moment_pages, work.num_evicted,
        tokens_of(cache), records_of(cache), *terms.stride()[:3], *lists.stride()[1:3], *moved.stride()[:2],
        work.store_pages.stride(0), work.retiring_pages.stride(0), work.moment_pages.stride(0),
        store_tokens, num_retiring, sink_tokens, attention_weight,
        BLOCK_C=triton.next_power_of_2(most), BLOCK_K=triton.next_power_of_2(num_retiring), BLOCK_L=BLOCK_L,
        IS_TERMS=score is None, HAS_MASS=mass is not None, HAS_MEANS=cache.record_layout.has_means, SIZES=sizes(cache),
        RECORD=record_sizes(cache), num_warps=8,
    )  # fmt: skip
