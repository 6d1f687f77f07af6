"""The two terms of the default score (policies/momentkv.py), one tile of candidates a program: first half of consolidate."""

import torch
import triton
import triton.language as tl

from .arguments import record_of, record_sizes, sizes, tokens_of
from .common import program_head, record_offset

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
def load_rows(
    pointer, page, slot, real, page_stride, slot_stride, dim_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Keys or values [N, D] as float32, zero where not `real`."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + (page * page_stride + slot * slot_stride)[:, None] + (d * dim_stride)[None, :]
    return tl.load(at, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _terms(
    terms, mass, store, retiring, moment_pages, num_evicted,
    keys, values, k_page, k_head, k_slot, k_dim, v_page, v_head, v_slot, v_dim,
    floats, covariance, f_page, f_head, c_page, c_head,
    t_row, t_head, t_term, m_page, m_head, row_store, row_retiring, row_moments, store_tokens, num_retiring,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), program_head()
    store += row * row_store
    retiring += row * row_retiring
    due = retiring_pages_of(retiring, num_retiring, BLOCK_K)
    candidates = store_tokens + due * PAGE
    first = tl.program_id(2) * BLOCK_N
    if (due == 0) | (first >= candidates):
        return
    keys += head * k_head
    values += head * v_head
    d = tl.arange(0, BLOCK_D)
    if tl.load(num_evicted + row) == 0:
        # Nothing evicted yet: the means are those of the candidates, which every tile adds up (once in a sequence's life).
        mean_key = tl.zeros((BLOCK_D,), tl.float32)
        mean_value = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, candidates, BLOCK_N):
            other = start + tl.arange(0, BLOCK_N)
            exists = other < candidates
            page = candidate_page(store, retiring, other, exists, store_tokens, PAGE)
            mean_key += tl.sum(load_rows(keys, page, other % PAGE, exists, k_page, k_slot, k_dim, HEAD_DIM, BLOCK_D), 0)
            mean_value += tl.sum(
                load_rows(values, page, other % PAGE, exists, v_page, v_slot, v_dim, HEAD_DIM, BLOCK_D), 0
            )
        mean_key /= candidates
        mean_value /= candidates
    else:
        pages = moment_pages + row * row_moments
        record = floats + head * f_head
        in_head = d < HEAD_DIM
        key_at = record_offset(pages, d, in_head, FLOATS, f_page)
        value_at = record_offset(pages, HEAD_DIM + d, in_head, FLOATS, f_page)
        mean_key = tl.load(record + key_at, mask=in_head, other=0.0)
        mean_value = tl.load(record + value_at, mask=in_head, other=0.0)
    candidate = first + tl.arange(0, BLOCK_N)
    real = candidate < candidates
    page = candidate_page(store, retiring, candidate, real, store_tokens, PAGE)
    slot = candidate % PAGE
    dk = load_rows(keys, page, slot, real, k_page, k_slot, k_dim, HEAD_DIM, BLOCK_D) - mean_key[None, :]
    dv = load_rows(values, page, slot, real, v_page, v_slot, v_dim, HEAD_DIM, BLOCK_D) - mean_value[None, :]
    seen = tl.load(mass + page * m_page + head * m_head + slot, mask=real, other=0.0)
    at = terms + row * t_row + head * t_head + candidate
    tl.store(at, tl.sqrt(tl.sum(dk * dk, 1)), mask=real)
    tl.store(at + t_term, seen * tl.sqrt(tl.sum(dv * dv, 1)), mask=real)


def score_terms(cache, observed: torch.Tensor, work) -> torch.Tensor:
    """[rows, heads, 2, candidates] float32: distance of the key to the mean evicted key; attention times that of the value.

    Rows without an event are left as they are (uninitialised).
    """
    rows, heads = len(work.num_evicted), cache.keys.shape[1]
    store_tokens = work.store_pages.shape[1] * cache.page_size
    num_retiring = work.retiring_pages.shape[1]
    most = store_tokens + num_retiring * cache.page_size
    terms = torch.empty(rows, heads, 2, most, dtype=torch.float32, device=cache.keys.device)
    _terms[(rows, heads, triton.cdiv(most, BLOCK_N))](
        terms, observed, work.store_pages, work.retiring_pages, work.moment_pages, work.num_evicted,
        *tokens_of(cache), *record_of(cache), *terms.stride()[:3], *observed.stride()[:2], work.store_pages.stride(0),
        work.retiring_pages.stride(0), work.moment_pages.stride(0), store_tokens, num_retiring,
        BLOCK_N=BLOCK_N, BLOCK_K=triton.next_power_of_2(num_retiring), **sizes(cache),
        FLOATS=record_sizes(cache)["FLOATS"], num_warps=4,
    )  # fmt: skip
    return terms
