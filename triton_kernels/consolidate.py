"""consolidate: choose the losers, fold them into the record, fill their slots. One program a (row, KV head).

Three barriers order what may share memory: the lists before they are read, losers read before winners move over them, and
winners read before the record is written, which at a sequence's first event lies in retiring pages.
"""

import torch
import triton
import triton.language as tl

from .arguments import record_of, record_sizes, sizes, tokens_of
from .common import dot, narrow, program_head, record_offset
from .score import candidate_page, load_rows, retiring_pages_of, score_terms

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
def _write_covariance(
    covariance, pages, merged, floats, page_stride, float_page,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCALES: tl.constexpr,
    HEADER: tl.constexpr, FLOATS: tl.constexpr, COVARIANCES: tl.constexpr,
):  # fmt: skip
    """merged [D (key), D (value)] in the record's type; int8: a row's largest number becomes 127."""
    d = tl.arange(0, BLOCK_D)
    real = d < HEAD_DIM
    at = record_offset(pages, HEADER + d * HEAD_DIM, real, COVARIANCES, page_stride)
    if HAS_SCALES:
        scale = tl.max(tl.abs(merged), 1) / 127
        scale_at = record_offset(pages, 2 * HEAD_DIM + 1 + d, real, FLOATS, float_page)
        tl.store(floats + scale_at, scale, mask=real)
        merged = tl.floor(merged / tl.maximum(scale, 1.2e-38)[:, None] + 0.5)
    tl.store(
        covariance + at[:, None] + d[None, :],
        narrow(merged, covariance.dtype.element_ty),
        mask=real[:, None] & real[None, :],
    )


@triton.jit
def _consolidate(
    score, mass, loser_list, winner_list, store, retiring, moment_pages, num_evicted,
    keys, values, k_page, k_head, k_slot, k_dim, v_page, v_head, v_slot, v_dim,
    floats, covariance, f_page, f_head, c_page, c_head,
    s_row, s_head, s_term, l_row, l_head, m_page, m_head, row_store, row_retiring, row_moments,
    store_tokens, num_retiring, sink_tokens, attention_weight,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, IS_TERMS: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_MEANS: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_COVARIANCE: tl.constexpr, HAS_SCALES: tl.constexpr, HEADER: tl.constexpr, FLOATS: tl.constexpr,
    COVARIANCES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), program_head()
    store += row * row_store
    retiring += row * row_retiring
    due = retiring_pages_of(retiring, num_retiring, BLOCK_K)
    if due == 0:
        return
    candidates, losers = store_tokens + due * PAGE, due * PAGE
    keys += head * k_head
    values += head * v_head
    mass += head * m_head
    loser_list += row * l_row + head * l_head
    winner_list += row * l_row + head * l_head

    # Choose.
    c = tl.arange(0, BLOCK_C)
    real = c < candidates
    score += row * s_row + head * s_head
    if IS_TERMS:
        far = tl.load(score + c, mask=real, other=0.0)
        asked = tl.load(score + s_term + c, mask=real, other=0.0)
        x = _relative(far, real, candidates) + attention_weight * _relative(asked, real, candidates)
    else:
        x = tl.load(score + c, mask=real, other=0.0)
    lost = _losers(tl.where(c < sink_tokens, float("inf"), x), c, real, losers)
    won = real & (lost == 0) & (c >= store_tokens)
    holes = tl.sum((lost & (c < store_tokens)).to(tl.int32), 0)
    tl.store(loser_list + tl.cumsum(lost.to(tl.int32), 0) - 1, c, mask=lost)
    tl.store(winner_list + tl.cumsum(won.to(tl.int32), 0) - 1, c, mask=won)
    tl.debug_barrier()

    # Fold the losers: means, then what is centred (two passes: no cancellation). Merge by Chan et al. 1979.
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    if HAS_MEANS:
        mean_key = tl.zeros((BLOCK_D,), tl.float32)
        mean_value = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, losers, BLOCK_L):
            j = first + tl.arange(0, BLOCK_L)
            i = tl.load(loser_list + j, mask=j < losers, other=0)
            page = candidate_page(store, retiring, i, j < losers, store_tokens, PAGE)
            mean_key += tl.sum(load_rows(keys, page, i % PAGE, j < losers, k_page, k_slot, k_dim, HEAD_DIM, BLOCK_D), 0)
            mean_value += tl.sum(
                load_rows(values, page, i % PAGE, j < losers, v_page, v_slot, v_dim, HEAD_DIM, BLOCK_D), 0
            )
        mean_key /= losers
        mean_value /= losers
        squares = tl.zeros((BLOCK_D,), tl.float32)
        if HAS_COVARIANCE:
            product = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        for first in range(0, losers, BLOCK_L):
            j = first + tl.arange(0, BLOCK_L)
            i = tl.load(loser_list + j, mask=j < losers, other=0)
            page = candidate_page(store, retiring, i, j < losers, store_tokens, PAGE)
            dv = load_rows(values, page, i % PAGE, j < losers, v_page, v_slot, v_dim, HEAD_DIM, BLOCK_D)
            dv = tl.where((j < losers)[:, None], dv - mean_value[None, :], 0.0)
            squares += tl.sum(dv * dv, 0)
            if HAS_COVARIANCE:
                dk = load_rows(keys, page, i % PAGE, j < losers, k_page, k_slot, k_dim, HEAD_DIM, BLOCK_D)
                dk = tl.where((j < losers)[:, None], dk - mean_key[None, :], 0.0)
                product += dot(tl.trans(dk), dv)
        spread = tl.sum(squares, 0) / losers

        before = tl.load(num_evicted + row)
        pages = moment_pages + row * row_moments
        floats += head * f_head
        covariance += head * c_head
        key_at = record_offset(pages, d, in_head, FLOATS, f_page)
        value_at = record_offset(pages, HEAD_DIM + d, in_head, FLOATS, f_page)
        spread_at = record_offset(pages, 2 * HEAD_DIM, True, FLOATS, f_page)
        # Nothing of an empty record counts: its pages hold tokens.
        old = d < tl.where(before > 0, HEAD_DIM, 0)
        share = losers / (before + losers)
        delta_key = tl.where(old, mean_key - tl.load(floats + key_at, mask=old, other=0.0), 0.0)
        delta_value = tl.where(old, mean_value - tl.load(floats + value_at, mask=old, other=0.0), 0.0)
        between = share * (1 - share)
        old_spread = tl.load(floats + spread_at)
        mixed = old_spread + share * (spread - old_spread) + between * tl.sum(delta_value * delta_value, 0)
        spread = tl.where(before > 0, mixed, spread)
        mean_key -= (1 - share) * delta_key
        mean_value -= (1 - share) * delta_value
        if HAS_COVARIANCE:
            product /= losers
            both = old[:, None] & in_head[None, :]
            at = record_offset(pages, HEADER + d * HEAD_DIM, in_head, COVARIANCES, c_page)
            c_old = tl.load(covariance + at[:, None] + d[None, :], mask=both, other=0).to(tl.float32)
            if HAS_SCALES:
                scale_at = record_offset(pages, 2 * HEAD_DIM + 1 + d, in_head, FLOATS, f_page)
                c_old *= tl.load(floats + scale_at, mask=old, other=0.0)[:, None]
            mixed_c = c_old + share * (product - c_old) + between * delta_key[:, None] * delta_value[None, :]
            product = tl.where(before > 0, mixed_c, product)
    tl.debug_barrier()

    # Fill: the i-th lost store slot takes the i-th retiring token that stays.
    for first in range(0, holes, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        ok = j < holes
        to, source = tl.load(loser_list + j, mask=ok, other=0), tl.load(winner_list + j, mask=ok, other=0)
        to_page = candidate_page(store, retiring, to, ok, store_tokens, PAGE)
        page = candidate_page(store, retiring, source, ok, store_tokens, PAGE)
        tile = ok[:, None] & in_head[None, :]
        k_from, k_to = page * k_page + (source % PAGE) * k_slot, to_page * k_page + (to % PAGE) * k_slot
        v_from, v_to = page * v_page + (source % PAGE) * v_slot, to_page * v_page + (to % PAGE) * v_slot
        k = tl.load(keys + k_from[:, None] + (d * k_dim)[None, :], mask=tile)
        v = tl.load(values + v_from[:, None] + (d * v_dim)[None, :], mask=tile)
        tl.store(keys + k_to[:, None] + (d * k_dim)[None, :], k, mask=tile)
        tl.store(values + v_to[:, None] + (d * v_dim)[None, :], v, mask=tile)
        if HAS_MASS:
            seen = tl.load(mass + page * m_page + source % PAGE, mask=ok)
            tl.store(mass + to_page * m_page + to % PAGE, seen, mask=ok)
    tl.debug_barrier()

    if HAS_MEANS:
        tl.store(floats + key_at, mean_key, mask=in_head)
        tl.store(floats + value_at, mean_value, mask=in_head)
        tl.store(floats + spread_at, spread)
        if HAS_COVARIANCE:
            _write_covariance(
                covariance, pages, product, floats, c_page, f_page,
                HEAD_DIM, BLOCK_D, HAS_SCALES, HEADER, FLOATS, COVARIANCES,
            )  # fmt: skip


def consolidate(
    cache, observed, score: torch.Tensor | None, work, sink_tokens: int, attention_weight: float, moves_mass: bool
) -> None:
    """As kernels/reference.py.

    Args:
        observed: [num_pages, num_kv_heads, page_size] float32 or None.
        score: [rows, heads, candidates] float32 of any policy; None: momentkv's, from `observed` and `attention_weight`.
        moves_mass: a token's observed attention moves along with it.
    """
    rows, heads = len(work.num_evicted), cache.keys.shape[1]
    num_retiring = work.retiring_pages.shape[1]
    if num_retiring == 0:
        return
    store_tokens = work.store_pages.shape[1] * cache.page_size
    most = store_tokens + num_retiring * cache.page_size
    terms = score_terms(cache, observed, work) if score is None else score.unsqueeze(2)
    lists = torch.empty(2, rows, heads, num_retiring * cache.page_size, dtype=torch.int32, device=cache.keys.device)
    mass = observed if moves_mass else terms
    shape = sizes(cache)
    _consolidate[(rows, heads)](
        terms, mass, lists[0], lists[1], work.store_pages, work.retiring_pages, work.moment_pages, work.num_evicted,
        *tokens_of(cache), *record_of(cache), *terms.stride()[:3], *lists.stride()[1:3], *mass.stride()[:2],
        work.store_pages.stride(0), work.retiring_pages.stride(0), work.moment_pages.stride(0),
        store_tokens, num_retiring, sink_tokens, attention_weight,
        BLOCK_C=triton.next_power_of_2(most), BLOCK_K=triton.next_power_of_2(num_retiring), BLOCK_L=BLOCK_L,
        IS_TERMS=score is None, HAS_MASS=moves_mass, HAS_MEANS=cache.record_layout.has_means, **shape, **record_sizes(cache),
        num_warps=8,
    )  # fmt: skip
