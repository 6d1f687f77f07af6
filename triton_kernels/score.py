"""The two terms of the native score (policies/key_direction.py), one tile of candidates a program: first half of consolidate.

Sums over all candidates are those of tiles, added up in order: the same bits every time.
"""

import torch
import triton
import triton.language as tl

from .arguments import EventLists, record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .common import float_at, program_head
from .event import event_of, load_keys, load_values, mass_at

BLOCK_N = 32


@triton.jit
def _directions(keys):
    """Keys [N, D] over their lengths; a zero key has none."""
    length = tl.sqrt(tl.sum(keys * keys, 1))
    return keys / tl.where(length < 1e-12, 1e-12, length)[:, None]  # NaN stays


@triton.jit
def tile_sums(tokens, tiles, head, event, i, real, with_values, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Sums [D] of the directions of candidates i and, if `with_values`, of their values."""
    direction = _directions(load_keys(tokens, tiles, head, event, i, real, SIZES, STORE))
    of_values = tl.zeros((SIZES.block_d,), tl.float32)
    if with_values:
        values = load_values(tokens, tiles, head, event, i, real, SIZES, STORE)
        of_values = tl.sum(tl.where(values == values, values, 0.0), 0)
    return tl.sum(tl.where(direction == direction, direction, 0.0), 0), of_values


@triton.jit
def unit(anchor):
    """The sum of all directions, of length 1."""
    return anchor / tl.maximum(tl.sqrt(tl.sum(anchor * anchor, 0)), 1e-8)


@triton.jit
def record_mean(records, head, pages, SIZES: tl.constexpr, RECORD: tl.constexpr):
    """Mean value [D] of those that were evicted."""
    d = tl.arange(0, SIZES.block_d)
    wanted = d < SIZES.head_dim
    return tl.load(float_at(records, head, pages, RECORD.mean_value + d, wanted, RECORD), mask=wanted, other=0.0)


@triton.jit
def tile_terms(
    at, t_term, mass, m_page, m_head, tokens, tiles, head, event, i, real, anchor, mean,
    HAS_ATTENTION: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Writes the terms of candidates i: how far a key is turned from all others; attention times how far a value lies off."""
    direction = _directions(load_keys(tokens, tiles, head, event, i, real, SIZES, STORE))
    turned = 1 - tl.sum(direction * anchor[None, :], 1)
    tl.store(at, tl.where(turned < 0, 0.0, turned), mask=real)
    if HAS_ATTENTION:
        away = load_values(tokens, tiles, head, event, i, real, SIZES, STORE) - mean[None, :]
        seen = tl.load(mass_at(mass, m_page, m_head, tiles, head, event, i, real, SIZES, STORE), mask=real, other=0.0)
        tl.store(at + t_term, seen * tl.sqrt(tl.sum(away * away, 1)), mask=real)


@triton.jit
def _sums(
    sums, lists, moment_pages, num_evicted, tokens, tiles, records, s_row, s_head, s_tile, row_moments,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ATTENTION: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile): the tile's sum of directions [D] and, where nothing is evicted yet, of values [D]."""
    row, head, tile = tl.program_id(0), program_head(), tl.program_id(2)
    event = event_of(
        lists, row, num_evicted, tiles, records, head, moment_pages + row * row_moments, BLOCK_K, SIZES, STORE, RECORD
    )
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if (event.losers == 0) | (tile * BLOCK_N >= event.candidates):
        return
    real = i < event.candidates
    asks = HAS_ATTENTION and event.before == 0
    of_keys, of_values = tile_sums(tokens, tiles, head, event, i, real, asks, SIZES, STORE)
    at = sums + row * s_row + head * s_head + tile * s_tile + tl.arange(0, SIZES.block_d)
    tl.store(at, of_keys)
    if asks:
        tl.store(at + SIZES.block_d, of_values)


@triton.jit
def _added(sums, s_tile, tiles, D: tl.constexpr):
    total = tl.zeros((D,), tl.float32)
    for tile in range(0, tiles):
        total += tl.load(sums + tile * s_tile + tl.arange(0, D))
    return total


@triton.jit
def _terms(
    terms, sums, mass, lists, moment_pages, num_evicted, tokens, tiles, records,
    t_row, t_head, t_term, s_row, s_head, s_tile, m_page, m_head, row_moments,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ATTENTION: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile)."""
    row, head, tile = tl.program_id(0), program_head(), tl.program_id(2)
    event = event_of(
        lists, row, num_evicted, tiles, records, head, moment_pages + row * row_moments, BLOCK_K, SIZES, STORE, RECORD
    )
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if (event.losers == 0) | (tile * BLOCK_N >= event.candidates):
        return
    real = i < event.candidates
    sums += row * s_row + head * s_head
    num_tiles = tl.cdiv(event.candidates, BLOCK_N)
    anchor = unit(_added(sums, s_tile, num_tiles, SIZES.block_d))
    mean = anchor
    if HAS_ATTENTION:
        if event.before == 0:
            mean = _added(sums + SIZES.block_d, s_tile, num_tiles, SIZES.block_d) / event.candidates
        else:
            mean = record_mean(records, head, moment_pages + row * row_moments, SIZES, RECORD)
    at = terms + row * t_row + head * t_head + i
    tile_terms(
        at,
        t_term,
        mass + head * m_head,
        m_page,
        m_head,
        tokens,
        tiles,
        head,
        event,
        i,
        real,
        anchor,
        mean,
        HAS_ATTENTION,
        SIZES,
        STORE,
    )


def score_terms(cache, mass: torch.Tensor | None, work, lists: EventLists) -> torch.Tensor:
    """[rows, heads, terms, candidates] float32, not yet relative to their means; the second term only with `mass`.

    Rows that evict nothing are left as they are (uninitialised).
    """
    rows, heads, device = len(work.num_evicted), cache.keys.shape[1], cache.keys.device
    shape, most = sizes(cache), lists.most_candidates(cache)
    num_tiles, num_terms = triton.cdiv(most, BLOCK_N), 1 if mass is None else 2
    terms = torch.empty(rows, heads, num_terms, most, dtype=torch.float32, device=device)
    sums = torch.empty(rows, heads, num_tiles, num_terms * shape.block_d, dtype=torch.float32, device=device)
    known = {
        "BLOCK_N": BLOCK_N, "BLOCK_K": triton.next_power_of_2(lists.retiring_pages), "HAS_ATTENTION": mass is not None,
        "SIZES": shape, "STORE": store_sizes(cache, work), "RECORD": record_sizes(cache), "num_warps": 4,
    }  # fmt: skip
    grid = (rows, heads, num_tiles)
    given = lists, work.moment_pages, work.num_evicted, tokens_of(cache), tiles_of(cache), records_of(cache)
    _sums[grid](sums, *given, *sums.stride()[:3], work.moment_pages.stride(0), **known)
    read = mass if mass is not None else terms
    _terms[grid](
        terms, sums, read, *given, *terms.stride()[:3], *sums.stride()[:3], *read.stride()[:2], work.moment_pages.stride(0),
        **known,
    )  # fmt: skip
    return terms
