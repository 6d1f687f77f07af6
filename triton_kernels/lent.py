"""Tiles that other heads have lent, at a sequence's first event: exact tokens may still lie there, which other programs read. So
what goes into them waits elsewhere until the launch is over (momentkv_vllm/head_budgets.py, `equal_until`).

Only where a first event takes more tokens than an equal share of the store: `room_for` says whether any can.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arguments import record_sizes, records_of, store_sizes, tiles_of
from .arguments import sizes as sizes_of
from .common import LAYER_NUMBERS, program_head
from .event import event_of
from .store import TILE, observed_at, tiles_at, tiles_of_layer

TILE_TOKENS = TILE.value


class Lent(NamedTuple):
    """Where tiles wait: bytes from a layer's cache, and numbers from what is observed in it; at first the first layer's. Then how
    many of a row and head, of how many rows, and tokens of an equal share."""

    codes: int
    seen: int
    tiles: int
    rows: int
    own: int


@triton.jit
def room_of(lent, row, place, by, mass_by, STORE: tl.constexpr):
    """That of a row. place: (layer, head) of all; by, mass_by: bytes from the first layer's cache to the layer's, and numbers
    from what is observed in the first one to what the head observes in it."""
    first = (place * lent.rows + row) * lent.tiles
    codes = first * STORE.tile_bytes + lent.codes - by
    return Lent(codes, first * TILE + lent.seen - mass_by, lent.tiles, lent.rows, lent.own)


@triton.jit
def waiting(lent, event, slots, STORE: tl.constexpr):
    """(whether they do, byte of the tile, number of what is observed) [N] of the store's slots."""
    behind = slots - lent.own
    return (event.packed == 0) & (behind >= 0), lent.codes + behind // TILE * STORE.tile_bytes, lent.seen + behind


@triton.jit
def _move_lent(
    layers, mass, lists, lent, moment_pages, num_evicted, tiles, records, m_page, m_head, row_moments,
    BYTES: tl.constexpr, BLOCK_K: tl.constexpr, HAS_MASS: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, layer): all that waits to its places. layers: as in consolidate_layers.py."""
    row, head, layer = tl.program_id(0), program_head(), tl.program_id(2)
    layers += LAYER_NUMBERS * layer
    tiles = tiles_of_layer(tiles, layers, STORE)
    # Nothing here reads a record.
    event = event_of(
        lists, row, num_evicted, tiles, records, head, moment_pages + row * row_moments, BLOCK_K, SIZES, STORE, RECORD
    )
    stay = event.candidates - event.losers
    if (event.packed > 0) | (stay <= lent.own):
        return
    mass_by = tl.load(layers + 1) // 4 + head * m_head
    lent = room_of(lent, row, layer * tl.num_programs(1) + head, tl.load(layers), mass_by, STORE)
    mass += mass_by
    b, token = tl.arange(0, BYTES), tl.arange(0, 8)
    for first in range(lent.own, stay, TILE):
        slot = tl.full((), 0, tl.int32) + first
        _, source, seen_at = waiting(lent, event, slot, STORE)
        to = tiles_at(tiles, head, event.store, slot, True, STORE)
        tile = tl.load(tiles.codes + source + b, mask=b < STORE.tile_bytes)
        tl.store(tiles.codes + to + b, tile, mask=b < STORE.tile_bytes)
        if HAS_MASS:
            column, within = observed_at(tiles, head, m_head, slot, True, STORE)
            seen = tl.load(mass + seen_at + token)
            tl.store(mass + tl.load(event.store + column).to(tl.int64) * m_page + within + token, seen)


def room_for(cache, mass, work, lists, layers: int) -> tuple[Lent | None, list[torch.Tensor]]:
    """None where no first event of `work` can take lent tiles; else room in tensors that must stay until `move_lent`."""
    if cache.heads is None or work.stored is None:
        return None, []
    most = (lists.store_pages + lists.retiring_pages) * cache.page_size
    most = min(most, work.first_tokens or most, cache.heads.most_tokens)
    tiles, rows = (most - lists.capacity) // TILE_TOKENS, len(work.num_evicted)
    if tiles <= 0:
        return None, []
    places, device = layers * cache.keys.shape[1] * rows * tiles, cache.keys.device
    codes = torch.empty(places * cache.packed.layout.tile_bytes, dtype=torch.uint8, device=device)
    seen = torch.empty(places * TILE_TOKENS, dtype=torch.float32, device=device)
    from_mass = 0 if mass is None else seen.data_ptr() - mass.data_ptr()
    return Lent(codes.data_ptr() - cache.raw.data_ptr(), from_mass // 4, tiles, rows, lists.capacity), [codes, seen]


def move_lent(cache, mass, work, lists, lent: Lent, layers: torch.Tensor) -> None:
    """Fill lent tiles with what waits. layers: as consolidate_layers of consolidate_layers.py."""
    moved, shape = mass if mass is not None else work.num_evicted.view(-1, 1, 1), store_sizes(cache, work)
    _move_lent[(lent.rows, cache.keys.shape[1], len(layers))](
        layers, moved, lists, lent, work.moment_pages, work.num_evicted, tiles_of(cache), records_of(cache),
        *moved.stride()[:2], work.moment_pages.stride(0),
        BYTES=triton.next_power_of_2(shape.tile_bytes), BLOCK_K=triton.next_power_of_2(lists.retiring_pages),
        HAS_MASS=mass is not None, SIZES=sizes_of(cache), STORE=shape, RECORD=record_sizes(cache), num_warps=4,
    )  # fmt: skip
