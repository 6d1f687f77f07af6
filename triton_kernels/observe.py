"""observe: the attention that observed queries give to every retained token, added to `mass` in place."""

import torch
import triton
import triton.language as tl

from .arguments import record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .centres import added, load_centres, products
from .common import capped, dot, dot_rotated, narrow, program_head
from .retained import exact_keys
from .store import kept_tokens, observed_at, rotated, stored_keys, tiles_at

BLOCK_M, BLOCK_N = 32, 64


@triton.jit
def _attention(
    query, lse, q_token, q_head, lse_token, token0, first_wanted, queries, k, slots, first_last, first_key, others, scale, head,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, IN_STORE: tl.constexpr,
):  # fmt: skip
    """[N] attention that a row's queries from first_wanted on give to keys k [D, N]; query i sees slots [N] up to first_last + i,
    of a store all of them, whose keys' centres are given."""
    ROWS: tl.constexpr = BLOCK_M // GROUPS
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, SIZES.block_d)
    total = tl.zeros((slots.shape[0],), tl.float32)
    for first in range(first_wanted, queries, ROWS):
        at = first + m // GROUPS
        real = (m < ROWS * GROUPS) & (at < queries)
        token = token0 + at
        query_head = head * GROUPS + m % GROUPS
        q_at = query + (token * q_token + query_head * q_head)[:, None] + d[None, :]
        q = tl.load(q_at, mask=real[:, None] & (d < SIZES.head_dim)[None, :], other=0.0)
        norm = tl.load(lse + token * lse_token + query_head, mask=real, other=0.0)
        if IN_STORE:
            q_first, q_others = products(q, first_key, others)
            logits = dot_rotated(rotated(q.to(tl.float32), STORE.block), k)
            logits += added(q_first, q_others, slots)
            seen = real[:, None] & (slots >= 0)[None, :]
        else:
            logits = dot(q, k)
            seen = real[:, None] & (slots[None, :] <= (first_last + at)[:, None])
        total += tl.sum(tl.where(seen, tl.exp(capped(logits * scale, SIZES) - norm[:, None]), 0.0), 0)
    return total


@triton.jit(do_not_specialize=["row_pages"])
def _observe(
    query, lse, mass, first_token, num_queries, pages, last_slot, stored, moment_pages, num_evicted, observe_from, restart,
    tokens, tiles, records, q_token, q_head, lse_token, m_page, m_head, row_pages, row_moments, store_pages, scale, num_slots,
    store_tiles,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile of slots): first the tiles of quantised stores, then those of exact pages."""
    row, head, tile = tl.program_id(0), program_head(), tl.program_id(2)
    queries = tl.load(num_queries + row).to(tl.int32)
    first_wanted = tl.load(observe_from + row).to(tl.int32)
    keep = tl.load(restart + row) == 0
    if (first_wanted >= queries) & keep:
        return
    mass += head * m_head
    pages += row * row_pages
    token0 = tl.load(first_token + row).to(tl.int64)
    in_store, _ = kept_tokens(stored, num_evicted, row, tiles, head, STORE)
    if STORE.bits and tile < store_tiles:
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mine = slots < in_store
        column, within = observed_at(tiles, head, m_head, slots, mine, STORE)
        mass_at = mass + tl.load(pages + column, mask=mine, other=0).to(tl.int64) * m_page + within
        at = tiles_at(tiles, head, pages, slots, mine, STORE)
        k = narrow(stored_keys(tiles, at, slots, mine, SIZES.block_d, STORE), query.dtype.element_ty)
        first_key, others = load_centres(records, head, moment_pages + row * row_moments, SIZES, STORE, RECORD)
        total = tl.load(mass_at, mask=slots < tl.where(keep, in_store, 0), other=0.0)
        total += _attention(
            query, lse, q_token, q_head, lse_token, token0, first_wanted, queries, k, slots, 0, first_key, others, scale, head,
            GROUPS, BLOCK_M, SIZES, STORE, True,
        )  # fmt: skip
        tl.store(mass_at, total, mask=mine)
        return
    skipped = tl.where(in_store > 0, store_pages, 0)
    slots = (tile - store_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    page = tl.load(pages + skipped + slots // SIZES.page, mask=slots < num_slots - skipped * SIZES.page, other=0)
    page = page.to(tl.int64)
    mine = page > 0  # page 0 is padding
    slot = slots % SIZES.page
    first_last = tl.load(last_slot + row).to(tl.int32)
    written = mine & (slots < first_last + queries)
    k = exact_keys(tokens, head, page, slot, written, SIZES)
    mass_at = mass + page * m_page + slot
    total = tl.load(mass_at, mask=mine & (slots < tl.where(keep, num_slots, 0)), other=0.0)
    total += _attention(
        query, lse, q_token, q_head, lse_token, token0, first_wanted, queries, k, slots, first_last, 0, 0, scale, head,
        GROUPS, BLOCK_M, SIZES, STORE, False,
    )  # fmt: skip
    tl.store(mass_at, total, mask=mine)


def observe(cache, mass, query, lse, work, scale: float) -> None:
    """As kernels/base.py, for attention mass [num_pages, num_kv_heads, slots of a page]."""
    rows, num_heads, heads = len(work.last_slot), query.shape[1], cache.keys.shape[1]
    groups, num_slots = num_heads // heads, work.pages.shape[1] * cache.page_size
    store_slots = cache.store_slots(work.store_pages) if work.stored is not None else 0
    # Codes that become numbers take registers.
    block_n = BLOCK_N if work.stored is None else BLOCK_N // 2
    store_tiles = triton.cdiv(store_slots, block_n)
    _observe[(rows, heads, store_tiles + triton.cdiv(num_slots, block_n))](
        query, lse, mass, work.first_token, work.num_queries, work.pages, work.last_slot, work.stored, work.moment_pages,
        work.num_evicted, work.observe_from, work.restart.view(torch.uint8), tokens_of(cache), tiles_of(cache), records_of(cache),
        *query.stride()[:2], lse.stride(0), *mass.stride()[:2], work.pages.stride(0), work.moment_pages.stride(0),
        work.store_pages, scale, num_slots, store_tiles,
        GROUPS=groups, BLOCK_M=max(BLOCK_M, triton.next_power_of_2(groups)), BLOCK_N=block_n, SIZES=sizes(cache),
        STORE=store_sizes(cache, work), RECORD=record_sizes(cache), num_warps=4,
    )  # fmt: skip
