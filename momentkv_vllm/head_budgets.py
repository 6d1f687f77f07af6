"""Heads that look far hold more: what each head of each layer holds of a sequence's store, and where.

Most heads attend to the newest tokens, some to any token that fits (induction heads: Olsson et al. 2022; retrieval heads:
Wu et al., arXiv 2404.15574). Which do so is a property of the model, so it is measured once (attention/head_reach.py). A sequence
holds the same pages in every layer; here their tiles (packed_store.py) are shared out anew over layers and heads. Pages, and so
schedule, pool and prefix cache, stay what they are.

A tile may be lent to a later layer, never to an earlier one: within a step a layer stores its new tokens and retires its pages
before a later one runs, so a lent tile never lies where tokens are still exact.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from momentkv_vllm.packed_store import TILE_TOKENS

LEAST_SHARE = 6
"""Every head holds at least 1 / 6 of an equal share; 1 / 3 was worse for answers (benchmarks/research/README.md)."""
STEPS = 64
"""A head's reach is rounded to so many steps: the last bits of a sum must not decide who holds a tile."""


@dataclass(frozen=True)
class Tile:
    """A tile of a sequence's store: in a page, in the part of a head of a layer."""

    layer: int
    head: int
    page: int
    number: int


@dataclass(frozen=True)
class HeadBudgets:
    """What kernels are told of one layer.

    capacity: [heads] int64 tokens of a head in a full store; equal_tokens: until so many have left the window, all heads hold
              all of them (`equal_until`).
    places:   [heads, most tiles, 3] int64, of a head's tiles in order: page of the store; bytes from the beginning of that page
              in this layer's cache to the tile; float32 numbers from that page's observations to the tile's. Where a head has
              fewer tiles than another, of this layer or of one beside it, its last one is repeated.
    """

    capacity: Tensor
    places: Tensor
    equal_tokens: int

    @property
    def most_tokens(self) -> int:
        """That any head may hold."""
        return self.places.shape[1] * TILE_TOKENS

    @cached_property
    def pages(self) -> int:
        """Pages that a store must have, found once: kernels are told at every call. Raises ValueError on a page below 0."""
        first, last = (int(page) for page in self.places[..., 0].aminmax())
        if first < 0:
            raise ValueError(f"a tile lies in page {first} of the store; the first page is 0")
        return last + 1

    def to(self, device: torch.device | str) -> "HeadBudgets":
        """The same on another device, where nobody may wait for `pages` any more: CUDA graphs are captured there."""
        moved = replace(self, capacity=self.capacity.to(device), places=self.places.to(device))
        vars(moved)["pages"] = self.pages
        return moved

    def evicted(self, stored: Tensor, evicted: Tensor) -> Tensor:
        """[rows, heads] float32 of rows that would hold `stored` tokens of each head and have evicted the others; as
        `PackedLayout::held` of csrc/common/params.h has it."""
        gone = (stored + evicted).unsqueeze(1)
        return torch.where(gone > self.equal_tokens, (gone - self.capacity).clamp(min=0), evicted.unsqueeze(1))


def equal_until(store_tokens: int, most_retired: int) -> int:
    """Tokens that have left the window until when every head holds them all: no more than fit, less what an event retires at
    most; at least one.

    The next event makes room where heads do not look far. The one after it is the first in which others may take their tiles:
    in one event no tile may be both read and written, because heads, and layers of a decode step, take their turns in any order.
    And none is. A tile that is given up is read last in an event that begins with no more tokens gone than these, and so ends
    with no more than an equal share gone; a lent tile is first written in an event that ends with more gone.

    A sequence's first event alone may end with more: where a prompt is exact, or a budget so small that what it takes is
    more than the store holds. It finds exact tokens where tiles will be, so kernels write lent ones when all heads have read.
    """
    return max(1, store_tokens - most_retired)


def least_tokens(store_tokens: int, grain: int) -> int:
    """What every head holds of a store at least: a sixth of an equal share, a multiple of `grain` tokens."""
    return max(grain, store_tokens // LEAST_SHARE // grain * grain)


def grain_of(run_tokens: int) -> int:
    """Tokens that a head gets or gives at a time: whole tiles and whole runs."""
    return max(run_tokens, TILE_TOKENS)


def shared(reach: Tensor, store_tokens: int, grain: int, longest: int) -> Tensor:
    """Tokens of each head: a sixth of an equal share, and of the rest in proportion to its reach.

    Args:
        reach: [layers, heads] share of attention that goes far, 0 to 1; NaN counts as 0.
        store_tokens: an equal share.
        grain: a head's tokens are a multiple of it.
        longest: no head can use more.

    Returns:
        [layers, heads] int64. Heads of the first n layers hold no more than n layers have, for any n. Equal shares where
        `longest` is no more than that.
    """
    layers, heads = reach.shape
    units, least, most = store_tokens // grain, least_tokens(store_tokens, grain) // grain, -(-longest // grain)
    if most <= units:
        return torch.full((layers, heads), units * grain)
    steps = (reach.nan_to_num() * STEPS).round().clamp(min=1).flatten().tolist()
    held = [least] * len(steps)
    room = (torch.arange(1, layers + 1) * heads * (units - least)).numpy()
    # One unit at a time to the head that has least for its reach, the first of equal ones. Layers up to one that has no room left
    # get nothing more.
    queue, closed = [(1 / step, number) for number, step in enumerate(steps)], -1
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        layer = number // heads
        if layer <= closed:
            continue
        held[number] += 1
        room[layer:] -= 1
        if not room[layer:].all():
            closed = max(closed, layer + int((room[layer:] == 0).nonzero()[0].max()))
        if held[number] < most:
            heapq.heappush(queue, ((held[number] - least + 1) / steps[number], number))
    return (torch.tensor(held) * grain).view(layers, heads)


def tiles_of(capacity: Tensor, store_tokens: int, page_tiles: int) -> list[list[list[Tile]]]:
    """The tiles of every head of every layer, in order: its own, then those that it is lent.

    An equal share is `store_tokens`; in the end a head holds the first `capacity` [layers, heads] tokens of its tiles. Its own
    come first: it holds as much as any other until all is full. Lent are those that heads of this layer or an earlier one give
    up.
    """
    own, spare, found = store_tokens // TILE_TOKENS, [], []
    for layer, held in enumerate((capacity // TILE_TOKENS).tolist()):
        mine = [[Tile(layer, head, n // page_tiles, n % page_tiles) for n in range(own)] for head in range(len(held))]
        spare += [tile for tiles, n in zip(mine, held, strict=True) for tile in tiles[n:]]
        found.append([tiles + [spare.pop() for _ in range(n - own)] for tiles, n in zip(mine, held, strict=True)])
    return found


def budgets(
    capacity: Tensor, tiles: Sequence[Sequence[Sequence[Tile]]], addresses: Tensor, sizes: "Sizes", equal_tokens: int
) -> list[HeadBudgets]:
    """What kernels are told of every layer.

    Args:
        capacity: [layers, heads].
        tiles: as `tiles_of` gives them.
        addresses: [layers, 2] int64 of a layer's cache and of its observations.
    """
    at, found = addresses.tolist(), []

    def place(layer: int, tile: Tile) -> tuple[int, int, int]:
        data, observed = (there - here for there, here in zip(at[tile.layer], at[layer], strict=True))
        data += tile.head * sizes.part_bytes + tile.number * sizes.tile_bytes
        return tile.page, data, observed // 4 + tile.head * sizes.part_slots + tile.number * TILE_TOKENS

    most = max(len(held) for heads in tiles for held in heads)
    for layer, heads in enumerate(tiles):
        padded = ([*held, *[held[-1]] * (most - len(held))] for held in heads)
        places = torch.tensor([[place(layer, tile) for tile in held] for held in padded])
        found.append(HeadBudgets(capacity[layer].contiguous(), places, equal_tokens))
    return found


@dataclass(frozen=True)
class Sizes:
    """part_bytes, part_slots: from a head's part of a page to the next head's, in the cache and in what is observed; tile_bytes:
    of a tile."""

    part_bytes: int
    part_slots: int
    tile_bytes: int
