"""The two terms of the default score (policies/momentkv.py), one tile of candidates a program: first half of consolidate."""

import torch
import triton
import triton.language as tl

from .arguments import record_sizes, records_of, sizes, tokens_of
from .common import float_at, program_head

BLOCK_N = 32


@triton.jit
def retiring_pages_of(retiring, num_retiring, BLOCK_K: tl.constexpr):
    """How many pages a row retires; its list ends in -1 where it retires fewer."""
    k = tl.arange(0, BLOCK_K)
    return tl.sum((tl.load(retiring + k, mask=k < num_retiring, other=-1) >= 0).to(tl.int32), 0)


@triton.jit
def candidate_page(store, retiring, candidate, real, store_tokens, PAGE: tl.constexpr):
    """Pages of candidates [N]: the store's slots first, then the retiring ones."""
    in_store = candidate < store_tokens
    of_store = tl.load(store + candidate // PAGE, mask=real & in_store, other=0)
    of_retiring = tl.load(retiring + (candidate - store_tokens) // PAGE, mask=real & (in_store == 0), other=0)
    return tl.where(in_store, of_store, of_retiring).to(tl.int64)


@triton.jit
def load_keys(tokens, head, page, slot, real, SIZES: tl.constexpr):
    """[N, D] float32, zero where not `real`."""
    d = tl.arange(0, SIZES.block_d)
    at = tokens.k + head * tokens.k_head + (page * tokens.k_page + slot * tokens.k_slot)[:, None]
    mask = real[:, None] & (d < SIZES.head_dim)[None, :]
    return tl.load(at + (d * tokens.k_dim)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_values(tokens, head, page, slot, real, SIZES: tl.constexpr):
    """[N, D] float32, zero where not `real`."""
    d = tl.arange(0, SIZES.block_d)
    at = tokens.v + head * tokens.v_head + (page * tokens.v_page + slot * tokens.v_slot)[:, None]
    mask = real[:, None] & (d < SIZES.head_dim)[None, :]
    return tl.load(at + (d * tokens.v_dim)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _means_of_candidates(
    tokens, head, store, retiring, candidates, store_tokens, BLOCK_N: tl.constexpr, SIZES: tl.constexpr
):
    """Nothing is evicted yet: every tile adds up all candidates (once in a sequence's life)."""
    mean_key = tl.zeros((SIZES.block_d,), tl.float32)
    mean_value = tl.zeros((SIZES.block_d,), tl.float32)
    for start in range(0, candidates, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        exists = other < candidates
        page = candidate_page(store, retiring, other, exists, store_tokens, SIZES.page)
        mean_key += tl.sum(load_keys(tokens, head, page, other % SIZES.page, exists, SIZES), 0)
        mean_value += tl.sum(load_values(tokens, head, page, other % SIZES.page, exists, SIZES), 0)
    return mean_key / candidates, mean_value / candidates


@triton.jit
def _terms(
    terms, mass, store, retiring, moment_pages, num_evicted, tokens, records,
    t_row, t_head, t_term, m_page, m_head, row_store, row_retiring, row_moments, store_tokens, num_retiring,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SIZES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile of candidates)."""
    row, head = tl.program_id(0), program_head()
    store += row * row_store
    retiring += row * row_retiring
    due = retiring_pages_of(retiring, num_retiring, BLOCK_K)
    candidates = store_tokens + due * SIZES.page
    first = tl.program_id(2) * BLOCK_N
    if (due == 0) | (first >= candidates):
        return
    if tl.load(num_evicted + row) == 0:
        mean_key, mean_value = _means_of_candidates(
            tokens, head, store, retiring, candidates, store_tokens, BLOCK_N, SIZES
        )
    else:
        pages = moment_pages + row * row_moments
        d = tl.arange(0, SIZES.block_d)
        real = d < SIZES.head_dim
        mean_key = tl.load(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mask=real, other=0.0)
        mean_value = tl.load(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mask=real, other=0.0)
    candidate = first + tl.arange(0, BLOCK_N)
    real = candidate < candidates
    page = candidate_page(store, retiring, candidate, real, store_tokens, SIZES.page)
    slot = candidate % SIZES.page
    dk = load_keys(tokens, head, page, slot, real, SIZES) - mean_key[None, :]
    dv = load_values(tokens, head, page, slot, real, SIZES) - mean_value[None, :]
    seen = tl.load(mass + page * m_page + head * m_head + slot, mask=real, other=0.0)
    at = terms + row * t_row + head * t_head + candidate
    tl.store(at, tl.sqrt(tl.sum(dk * dk, 1)), mask=real)
    tl.store(at + t_term, seen * tl.sqrt(tl.sum(dv * dv, 1)), mask=real)


def score_terms(cache, mass: torch.Tensor, work) -> torch.Tensor:
    """[rows, heads, 2, candidates] float32: distance of the key to the mean evicted key; attention times that of the value.

    Rows without an event are left as they are (uninitialised).
    """
    rows, heads = len(work.num_evicted), cache.keys.shape[1]
    store_tokens = work.store_pages.shape[1] * cache.page_size
    num_retiring = work.retiring_pages.shape[1]
    most = store_tokens + num_retiring * cache.page_size
    terms = torch.empty(rows, heads, 2, most, dtype=torch.float32, device=cache.keys.device)
    _terms[(rows, heads, triton.cdiv(most, BLOCK_N))](
        terms, mass, work.store_pages, work.retiring_pages, work.moment_pages, work.num_evicted, tokens_of(cache),
        records_of(cache), *terms.stride()[:3], *mass.stride()[:2], work.store_pages.stride(0),
        work.retiring_pages.stride(0), work.moment_pages.stride(0), store_tokens, num_retiring,
        BLOCK_N=BLOCK_N, BLOCK_K=triton.next_power_of_2(num_retiring), SIZES=sizes(cache), RECORD=record_sizes(cache),
        num_warps=4,
    )  # fmt: skip
    return terms
