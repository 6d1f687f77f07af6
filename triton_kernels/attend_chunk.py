"""attend for rows with several queries: one pass over the retained tokens, the moment record as the last softmax update."""

import triton
import triton.language as tl

from .arguments import attending_warps, record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .common import LN2, LOG2E, narrow, program_head, record_partial
from .retained import attend_retained
from .store import kept_tokens
from .tuning import CHUNK, Tuning


@triton.jit
def _with_partial(acc, peak, total, out, log2_mass):
    """One more update of a running softmax in base 2: by an output [M, D] that is normalised already."""
    higher = tl.maximum(peak, log2_mass)
    shrink, weight = tl.exp2(peak - higher), tl.exp2(log2_mass - higher)
    return acc * shrink[:, None] + out * weight[:, None], higher, total * shrink + weight


@triton.jit(do_not_specialize=["row_pages"])
def _chunk(
    query, output, lse_out, first_token, num_queries, pages, last_slot, stored, moment_pages, num_evicted, tokens, tiles,
    records, q_token, q_head, out_token, out_head, lse_token, row_pages, row_moments, store_pages, scale,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CORRECTED: tl.constexpr, HAS_LSE: tl.constexpr,
    SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, KV head, row)."""
    TILE: tl.constexpr = BLOCK_M // GROUPS
    first, head, row = tl.program_id(0) * TILE, program_head(), tl.program_id(2)
    queries = tl.load(num_queries + row).to(tl.int32)
    if (queries <= 1) | (first >= queries):
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, SIZES.block_d)
    at = first + m // GROUPS
    real = (m < TILE * GROUPS) & (at < queries)
    tile = real[:, None] & (d < SIZES.head_dim)[None, :]
    token = tl.load(first_token + row).to(tl.int64) + at
    query_head = head * GROUPS + m % GROUPS
    q_at = query + (token * q_token + query_head * q_head)[:, None]
    q = tl.load(q_at + d[None, :], mask=tile, other=0.0)
    first_last = tl.load(last_slot + row).to(tl.int32)
    limit = tl.where(real, first_last + at, -1)
    end = first_last + tl.minimum(first + TILE, queries)
    pages += row * row_pages
    in_store, evicted = kept_tokens(stored, num_evicted, row, tiles, head, STORE)
    exact_pages = pages + tl.where(in_store > 0, store_pages, 0)
    acc, peak, total = attend_retained(
        q,
        limit,
        0,
        in_store,
        0,
        end,
        tokens,
        tiles,
        head,
        pages,
        exact_pages,
        scale,
        limit,
        limit,
        real,
        records,
        moment_pages + row * row_moments,
        BLOCK_N,
        SIZES,
        STORE,
        RECORD,
        False,
    )
    if CORRECTED and evicted != 0:
        out, log_mass = record_partial(
            q, q_at, real, evicted, records, head, moment_pages + row * row_moments, scale, SIZES, RECORD
        )
        acc, peak, total = _with_partial(acc, peak, total, out, log_mass * LOG2E)
    out_at = output + (token * out_token + query_head * out_head)[:, None] + d[None, :]
    safe = tl.where(real, total, 1.0)
    tl.store(out_at, narrow(acc / safe[:, None], output.dtype.element_ty), mask=tile)
    if HAS_LSE:
        tl.store(lse_out + token * lse_token + query_head, (peak + tl.log2(safe)) * LN2, mask=real)


def attend_chunk(
    cache, query, output, lse, work, scale: float, corrected: bool, most_queries: int, tuning: Tuning = CHUNK
) -> None:
    """Rows of `work` with more than one query. Shapes as in kernels/base.py; most_queries bounds work.num_queries."""
    rows, num_heads, heads = len(work.last_slot), query.shape[1], cache.keys.shape[1]
    groups = num_heads // heads
    block_n = tuning.tile if query.shape[2] <= 128 else tuning.tile // 2
    block_m = max(tuning.rows, triton.next_power_of_2(groups))
    grid = (triton.cdiv(most_queries, block_m // groups), heads, rows)
    _chunk[grid](
        query, output, lse if lse is not None else output, work.first_token, work.num_queries, work.pages, work.last_slot,
        work.stored, work.moment_pages, work.num_evicted, tokens_of(cache), tiles_of(cache), records_of(cache),
        *query.stride()[:2], *output.stride()[:2], 0 if lse is None else lse.stride(0), work.pages.stride(0),
        work.moment_pages.stride(0), work.store_pages, scale,
        GROUPS=groups, BLOCK_M=block_m, BLOCK_N=block_n, CORRECTED=corrected, HAS_LSE=lse is not None,
        SIZES=sizes(cache), STORE=store_sizes(cache, work), RECORD=record_sizes(cache),
        num_warps=attending_warps(work), num_stages=tuning.stages,
    )  # fmt: skip
