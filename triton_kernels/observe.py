"""observe: the attention that observed queries give to every retained token, added to `mass` in place."""

import torch
import triton
import triton.language as tl

from .arguments import sizes, tokens_of
from .common import dot, program_head

BLOCK_M, BLOCK_N = 32, 64


@triton.jit
def _observe(
    query, lse, mass, first_token, num_queries, pages, last_slot, observe_from, restart, tokens,
    q_token, q_head, lse_token, m_page, m_head, row_pages, scale, num_slots,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile of slots)."""
    TILE: tl.constexpr = BLOCK_M // GROUPS
    row, head = tl.program_id(0), program_head()
    queries = tl.load(num_queries + row).to(tl.int32)
    first_wanted = tl.load(observe_from + row).to(tl.int32)
    keep = tl.load(restart + row) == 0
    if (first_wanted >= queries) & keep:
        return
    slots = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, SIZES.block_d)
    page = tl.load(pages + row * row_pages + slots // SIZES.page, mask=slots < num_slots, other=0).to(tl.int64)
    mine = page > 0  # page 0 is padding
    slot = slots % SIZES.page
    first_last = tl.load(last_slot + row).to(tl.int32)
    written = mine & (slots < first_last + queries)
    k = tl.load(
        tokens.k + head * tokens.k_head + (page * tokens.k_page + slot * tokens.k_slot)[None, :] + (d * tokens.k_dim)[:, None],
        mask=written[None, :] & (d < SIZES.head_dim)[:, None],
        other=0.0,
    )  # fmt: skip
    mass_at = mass + page * m_page + head * m_head + slot
    total = tl.load(mass_at, mask=mine & (slots < tl.where(keep, num_slots, 0)), other=0.0)
    token0 = tl.load(first_token + row).to(tl.int64)
    for first in range(first_wanted, queries, TILE):
        at = first + m // GROUPS
        real = (m < TILE * GROUPS) & (at < queries)
        token = token0 + at
        query_head = head * GROUPS + m % GROUPS
        q_at = query + (token * q_token + query_head * q_head)[:, None] + d[None, :]
        q = tl.load(q_at, mask=real[:, None] & (d < SIZES.head_dim)[None, :], other=0.0)
        norm = tl.load(lse + token * lse_token + query_head, mask=real, other=0.0)
        seen = real[:, None] & written[None, :] & (slots[None, :] <= (first_last + at)[:, None])
        total += tl.sum(tl.where(seen, tl.exp(dot(q, k) * scale - norm[:, None]), 0.0), 0)
    tl.store(mass_at, total, mask=mine)


def observe(cache, mass, query, lse, work, scale: float) -> None:
    """As kernels/base.py, for attention mass [num_pages, num_kv_heads, page_size]."""
    rows, num_heads, heads = len(work.last_slot), query.shape[1], cache.keys.shape[1]
    groups, num_slots = num_heads // heads, work.pages.shape[1] * cache.page_size
    _observe[(rows, heads, triton.cdiv(num_slots, BLOCK_N))](
        query, lse, mass, work.first_token, work.num_queries, work.pages, work.last_slot, work.observe_from,
        work.restart.view(torch.uint8), tokens_of(cache), *query.stride()[:2], lse.stride(0),
        *mass.stride()[:2], work.pages.stride(0), scale, num_slots,
        GROUPS=groups, BLOCK_M=max(BLOCK_M, triton.next_power_of_2(groups)), BLOCK_N=BLOCK_N, SIZES=sizes(cache), num_warps=4,
    )  # fmt: skip
