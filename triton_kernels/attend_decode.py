"""attend for rows with one query: split-KV. The moment record is one more split of the same softmax reduction.

Parts come in the order record, splits of the quantised store, splits of exact pages: where a row's parts lie does not depend
on how many the other rows have. A tile holds all query heads of a KV head, so that the keys, the values and the covariance are
each read once.
"""

import torch
import triton
import triton.language as tl

from .arguments import attending_warps, record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .common import LN2, LOG2E, narrow, program_head, record_partial
from .retained import attend_retained
from .store import kept_tokens, observed_at
from .tuning import DECODE, Tuning

OBSERVED_AT_ONCE = 128
"""Slots that a program observes at a time."""
LEAST_PARTS = 8
"""Parts that the second kernel is compiled for at least, so that few lists need one of their own."""


@triton.jit(do_not_specialize=["row_pages", "l_row", "l_head"])
def _partials(
    query, part_out, part_lse, logits, first_token, num_queries, pages, last_slot, stored, moment_pages, num_evicted,
    observe_from, tokens, tiles, records, q_token, q_head, o_row, o_head, o_part, l_row, l_head, l_part, row_pages, row_moments,
    store_pages, scale, store_splits, store_slots, all_slots,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, RECORDS: tl.constexpr,
    OBSERVES: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, part): the part's normalised output and logsumexp; -inf where it has nothing. RECORDS: parts that
    are the moment record, 0 or 1. OBSERVES: of queries that count, logits are left for the second kernel."""
    row, head, part = tl.program_id(0), program_head(), tl.program_id(2)
    if tl.load(num_queries + row) != 1:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, SIZES.block_d)
    lse_at = part_lse + row * l_row + head * l_head + part * l_part + m
    in_store, evicted = kept_tokens(stored, num_evicted, row, tiles, head, STORE)
    visible = tl.load(last_slot + row).to(tl.int32) + 1
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
        left, leaves = m, m < GROUPS
        if OBSERVES:
            left = logits + (row * tl.num_programs(1) + head) * GROUPS * all_slots + m * all_slots
            leaves = m < tl.where(tl.load(observe_from + row) < 1, GROUPS, 0)
        acc, peak, total = attend_retained(
            q, tl.zeros((BLOCK_M,), tl.int32) + visible - 1, store_from, store_to, exact_from, exact_to, tokens, tiles, head,
            pages, exact_pages, scale, left, left + store_slots, leaves, records, moment_pages + row * row_moments,
            BLOCK_N, SIZES, STORE, RECORD, OBSERVES,
        )  # fmt: skip
        out = acc / total[:, None]
        lse = (peak + tl.log2(total)) * LN2
    tl.store(lse_at, lse, mask=m < GROUPS)
    out_at = part_out + row * o_row + head * o_head + part * o_part + m[:, None] * SIZES.head_dim + d[None, :]
    tl.store(out_at, out, mask=tile)


@triton.jit
def _observe_left(
    logits, lse, mass, pages, last_slot, in_store, keep, tiles, head, m_page, m_head, store_pages, store_slots, all_slots, first,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Adds what a query gives to slots [first, first + BLOCK_N) of `logits` [GROUPS, all slots], those of the store first; or
    begins with it where not `keep`. lse [BLOCK_G] in base 2; mass: of the head."""
    s, g = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_G)
    inside = s < store_slots
    slot = tl.where(inside, s, s - store_slots)
    skipped = tl.where(in_store > 0, store_pages, 0)
    exact = (all_slots - store_slots) - skipped * SIZES.page
    real = slot < tl.where(inside, in_store, last_slot + 1)
    at, within = skipped + slot // SIZES.page, slot % SIZES.page
    listed = slot < tl.where(inside, in_store, exact)
    if STORE.bits:
        column, of_store = observed_at(tiles, head, m_head, slot, inside & listed, STORE)
        at, within = tl.where(inside, column, at), tl.where(inside, of_store, within)
    page = tl.load(pages + at, mask=listed & (s < all_slots), other=0).to(tl.int64)
    mine = page > 0  # page 0 is padding
    mass_at = mass + page * m_page + within
    wanted = (g < GROUPS)[:, None] & (mine & real)[None, :]
    x = tl.load(logits + g[:, None] * all_slots + s[None, :], mask=wanted, other=float("-inf"))
    seen = tl.sum(tl.where(wanted, tl.exp2(x - lse[:, None]), 0.0), 0)
    tl.store(mass_at, tl.load(mass_at, mask=mine & (s < tl.where(keep, all_slots, 0)), other=0.0) + seen, mask=mine)


@triton.jit(do_not_specialize=["l_row", "l_head", "num_parts", "row_pages"])
def _reduce(
    part_out, part_lse, output, lse_out, logits, mass, first_token, num_queries, pages, last_slot, stored, num_evicted,
    observe_from, restart, tiles, o_row, o_head, o_part, l_row, l_head, l_part, out_token, out_head, lse_token, m_page, m_head,
    row_pages, num_parts, store_pages, store_slots, all_slots,
    GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LSE: tl.constexpr, OBSERVES: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Program (row, query head): the softmax over the parts. OBSERVES: and a share of the slots of its KV head observed."""
    HEAD_DIM: tl.constexpr = SIZES.head_dim
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
    if OBSERVES:
        counts = tl.load(observe_from + row) < 1
        if counts:
            g = tl.arange(0, BLOCK_G)
            every_at = part_lse + row * l_row + head * l_head + (part * l_part)[:, None] + g[None, :]
            asks = (part < num_parts)[:, None] & (g < GROUPS)[None, :]
            every = tl.load(every_at, mask=asks, other=float("-inf"))
            top = tl.max(every, 0)
            base = tl.where(top == float("-inf"), 0.0, top)
            norm = (base + tl.log(tl.sum(tl.exp(every - base[None, :]), 0))) * LOG2E
            keep, last = tl.load(restart + row) == 0, tl.load(last_slot + row).to(tl.int32)
            wide = head.to(tl.int64)
            in_store, _ = kept_tokens(stored, num_evicted, row, tiles, wide, STORE)
            for at_slot in range(m * BLOCK_N, all_slots, GROUPS * BLOCK_N):
                _observe_left(
                    logits + (row.to(tl.int64) * tl.num_programs(1) + head * GROUPS) * all_slots, norm,
                    mass + wide * m_head, pages + row * row_pages, last, in_store, keep, tiles, wide, m_page, m_head,
                    store_pages, store_slots, all_slots, at_slot, GROUPS, BLOCK_G, BLOCK_N, SIZES, STORE,
                )  # fmt: skip


def attend_decode(
    cache,
    query,
    output,
    lse,
    work,
    scale: float,
    corrected: bool,
    tuning: Tuning = DECODE,
    mass: torch.Tensor | None = None,
) -> None:
    """Rows of `work` with one query; other rows are left to attend_chunk. Shapes as in kernels/base.py.

    A split is fixed, not fitted to the batch, so that a row's result does not depend on the others. With `mass`, queries that
    count are observed in it, as `observe` of kernels/base.py does, without another launch.
    """
    rows, (num_heads, head_dim), heads = len(work.last_slot), query.shape[1:], cache.keys.shape[1]
    groups, observes = num_heads // heads, mass is not None
    store_slots = cache.store_slots(work.store_pages) if work.stored is not None else 0
    slots = work.pages.shape[1] * cache.page_size
    # A split longer than any list is one as long as the longest: a number that compiled kernels share.
    split = min(tuning.split, triton.next_power_of_2(max(store_slots, slots)))
    store_splits = triton.cdiv(store_slots, split)
    parts = corrected + store_splits + triton.cdiv(slots, split)
    # Written before they are read; inside a CUDA graph they come from its own pool.
    part_out = torch.empty(rows, heads, parts, groups, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(rows, heads, parts, groups, dtype=torch.float32, device=query.device)
    # Rows that are not observed leave their part alone: it costs addresses and no memory traffic.
    left = torch.empty(rows, num_heads, store_slots + slots, device=query.device) if observes else part_lse
    seen, restart = (mass, work.restart.view(torch.uint8)) if observes else (part_lse, work.restart)
    shape, store = sizes(cache), store_sizes(cache, work)
    _partials[(rows, heads, parts)](
        query, part_out, part_lse, left, work.first_token, work.num_queries, work.pages, work.last_slot, work.stored,
        work.moment_pages, work.num_evicted, work.observe_from, tokens_of(cache), tiles_of(cache), records_of(cache),
        *query.stride()[:2], *part_out.stride()[:3], *part_lse.stride()[:3], work.pages.stride(0), work.moment_pages.stride(0),
        work.store_pages, scale, store_splits, store_slots, store_slots + slots,
        GROUPS=groups, BLOCK_M=max(16, triton.next_power_of_2(groups)), SPLIT=split, BLOCK_N=min(tuning.tile, split),
        RECORDS=int(corrected), OBSERVES=observes, SIZES=shape, STORE=store, RECORD=record_sizes(cache),
        num_warps=attending_warps(work), num_stages=tuning.stages,
    )  # fmt: skip
    _reduce[(rows, num_heads)](
        part_out, part_lse, output, lse if lse is not None else part_lse, left, seen, work.first_token, work.num_queries,
        work.pages, work.last_slot, work.stored, work.num_evicted, work.observe_from, restart, tiles_of(cache),
        *part_out.stride()[:3], *part_lse.stride()[:3], *output.stride()[:2], 0 if lse is None else lse.stride(0),
        *seen.stride()[:2], work.pages.stride(0), parts, work.store_pages, store_slots, store_slots + slots,
        GROUPS=groups, BLOCK_D=shape.block_d, BLOCK_P=max(LEAST_PARTS, triton.next_power_of_2(parts)),
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_N=OBSERVED_AT_ONCE, HAS_LSE=lse is not None, OBSERVES=observes,
        SIZES=shape, STORE=store, num_warps=4,
    )  # fmt: skip
