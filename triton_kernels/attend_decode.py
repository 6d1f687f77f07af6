"""attend for rows with one query: split-KV. The moment record is one more split of the same softmax reduction.

Parts come in the order record, splits of the quantised store, splits of exact pages: where a row's parts lie does not depend
on how many the other rows have. A tile holds all query heads of a KV head, so that the keys, the values and the covariance are
each read once.
"""

import torch
import triton
import triton.language as tl

from .arguments import attending_warps, record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .common import LN2, narrow, program_head, record_partial
from .retained import attend_retained, stored_tokens
from .tuning import DECODE, Tuning

LEAST_PARTS = 8
"""Parts that the second kernel is compiled for at least, so that few lists need one of their own."""


@triton.jit(do_not_specialize=["row_pages", "l_row", "l_head"])
def _partials(
    query, part_out, part_lse, first_token, num_queries, pages, last_slot, stored, moment_pages, num_evicted, tokens, tiles,
    records, q_token, q_head, o_row, o_head, o_part, l_row, l_head, l_part, row_pages, row_moments, store_pages, scale,
    store_splits,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, RECORDS: tl.constexpr,
    SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, part): the part's normalised output and logsumexp; -inf where it has nothing. RECORDS: parts that
    are the moment record, 0 or 1."""
    row, head, part = tl.program_id(0), program_head(), tl.program_id(2)
    if tl.load(num_queries + row) != 1:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, SIZES.block_d)
    lse_at = part_lse + row * l_row + head * l_head + part * l_part + m
    in_store = stored_tokens(stored, row, STORE)
    visible = tl.load(last_slot + row).to(tl.int32) + 1
    evicted = tl.load(num_evicted + row)
    store_from, exact_from = (part - RECORDS) * SPLIT, (part - RECORDS - store_splits) * SPLIT
    store_to = tl.minimum(store_from + SPLIT, in_store)
    # Before the first exact split this is nothing: no slot is negative.
    exact_to = tl.where(exact_from >= 0, tl.minimum(exact_from + SPLIT, visible), exact_from)
    empty = tl.where(part < RECORDS, evicted == 0, (store_from >= store_to) & (exact_from >= exact_to))
    if empty:
        tl.store(lse_at, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=m < GROUPS)
        return
    tile = (m < GROUPS)[:, None] & (d < SIZES.head_dim)[None, :]
    token = tl.load(first_token + row).to(tl.int64)
    q_at = query + token * q_token + (head * GROUPS + m)[:, None] * q_head
    q = tl.load(q_at + d[None, :], mask=tile, other=0.0)
    if part < RECORDS:
        out, lse = record_partial(
            q, q_at, m < GROUPS, evicted, records, head, moment_pages + row * row_moments, scale, SIZES, RECORD
        )
    else:
        pages += row * row_pages
        exact_pages = pages + tl.where(in_store > 0, store_pages, 0)
        acc, peak, total = attend_retained(
            q, tl.zeros((BLOCK_M,), tl.int32) + visible - 1, store_from, store_to, exact_from, exact_to, tokens, tiles, head,
            pages, exact_pages, scale, BLOCK_N, SIZES, STORE,
        )  # fmt: skip
        out = acc / total[:, None]
        lse = (peak + tl.log2(total)) * LN2
    tl.store(lse_at, lse, mask=m < GROUPS)
    out_at = part_out + row * o_row + head * o_head + part * o_part + m[:, None] * SIZES.head_dim + d[None, :]
    tl.store(out_at, out, mask=tile)


@triton.jit(do_not_specialize=["l_row", "l_head", "num_parts"])
def _reduce(
    part_out, part_lse, output, lse_out, first_token, num_queries,
    o_row, o_head, o_part, l_row, l_head, l_part, out_token, out_head, lse_token, num_parts,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program (row, query head): the softmax over the parts."""
    row, query_head = tl.program_id(0), tl.program_id(1)
    if tl.load(num_queries + row) != 1:
        return
    head, m = query_head // GROUPS, query_head % GROUPS
    part, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    lse_at = part_lse + row * l_row + head * l_head + part * l_part + m
    lse = tl.load(lse_at, mask=part < num_parts, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.exp(lse - peak)
    total = tl.sum(weight, 0)
    # Empty parts wrote no output: what lies there is not read.
    tile = (weight > 0)[:, None] & (d < HEAD_DIM)[None, :]
    out_at = part_out + row * o_row + head * o_head + (part * o_part)[:, None] + m * HEAD_DIM + d[None, :]
    out = tl.sum(tl.load(out_at, mask=tile, other=0.0) * weight[:, None], 0) / total
    token = tl.load(first_token + row).to(tl.int64)
    at = output + token * out_token + query_head * out_head + d
    tl.store(at, narrow(out, output.dtype.element_ty), mask=d < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse_out + token * lse_token + query_head, peak + tl.log(total))


def attend_decode(cache, query, output, lse, work, scale: float, corrected: bool, tuning: Tuning = DECODE) -> None:
    """Rows of `work` with one query; other rows are left to attend_chunk. Shapes as in kernels/base.py.

    A split is fixed, not fitted to the batch, so that a row's result does not depend on the others.
    """
    rows, (num_heads, head_dim), heads = len(work.last_slot), query.shape[1:], cache.keys.shape[1]
    groups = num_heads // heads
    packed_slots = work.store_pages * cache.packed.page_tokens if work.stored is not None else 0
    slots = work.pages.shape[1] * cache.page_size
    # A split longer than any list is one as long as the longest: a number that compiled kernels share.
    split = min(tuning.split, triton.next_power_of_2(max(packed_slots, slots)))
    store_splits = triton.cdiv(packed_slots, split)
    parts = corrected + store_splits + triton.cdiv(slots, split)
    # Written before they are read; inside a CUDA graph they come from its own pool.
    part_out = torch.empty(rows, heads, parts, groups, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(rows, heads, parts, groups, dtype=torch.float32, device=query.device)
    shape = sizes(cache)
    _partials[(rows, heads, parts)](
        query, part_out, part_lse, work.first_token, work.num_queries, work.pages, work.last_slot, work.stored,
        work.moment_pages, work.num_evicted, tokens_of(cache), tiles_of(cache), records_of(cache), *query.stride()[:2],
        *part_out.stride()[:3], *part_lse.stride()[:3], work.pages.stride(0), work.moment_pages.stride(0), work.store_pages,
        scale, store_splits,
        GROUPS=groups, BLOCK_M=max(16, triton.next_power_of_2(groups)), SPLIT=split, BLOCK_N=min(tuning.tile, split),
        RECORDS=int(corrected), SIZES=shape, STORE=store_sizes(cache, work), RECORD=record_sizes(cache),
        num_warps=attending_warps(work), num_stages=tuning.stages,
    )  # fmt: skip
    _reduce[(rows, num_heads)](
        part_out, part_lse, output, lse if lse is not None else part_lse, work.first_token, work.num_queries,
        *part_out.stride()[:3], *part_lse.stride()[:3], *output.stride()[:2], 0 if lse is None else lse.stride(0), parts,
        GROUPS=groups, HEAD_DIM=head_dim, BLOCK_D=shape.block_d, BLOCK_P=max(LEAST_PARTS, triton.next_power_of_2(parts)),
        HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
