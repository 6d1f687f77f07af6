"""Kernel arguments that several launches take, bundled: a cache by its strides, a record by its layout.

A field must not be called `values`, `type` or `handle`: inside a kernel a tuple has those already.
"""

from typing import Any, NamedTuple

import torch
import triton


class Tokens(NamedTuple):
    """Keys `k` and values `v` of a cache, and their strides by page, head, slot and dimension."""

    k: torch.Tensor
    v: torch.Tensor
    k_page: int
    k_head: int
    k_slot: int
    k_dim: int
    v_page: int
    v_head: int
    v_slot: int
    v_dim: int


class Records(NamedTuple):
    """A cache's memory from page 0, head 0 on, as float32 and as the covariance's type, and strides by page and head."""

    floats: torch.Tensor
    covariance: torch.Tensor
    f_page: int
    f_head: int
    c_page: int
    c_head: int


class Tiles(NamedTuple):
    """A cache's memory from page 0, head 0 on as quantised store pages: codes, and scales as bits of bfloat16; strides by page
    and head in bytes. Then momentkv_vllm.head_budgets.HeadBudgets, None each where all heads hold as much."""

    codes: torch.Tensor
    scales: torch.Tensor
    page: int
    head: int
    places: torch.Tensor | None
    capacity: torch.Tensor | None
    most_tiles: int | None
    equal_tokens: int | None


class EventLists(NamedTuple):
    """A retire list: its store and retiring pages with their strides by row and their numbers, tokens in quantised stores (None:
    there are none), and tokens that a full store holds."""

    store: torch.Tensor
    retiring: torch.Tensor
    stored: torch.Tensor | None
    row_store: int
    row_retiring: int
    store_pages: int
    retiring_pages: int
    capacity: int

    def most_candidates(self, cache: Any) -> int:
        """Of a row and head."""
        return max(self.store_pages * cache.page_size, self.most_held(cache)) + self.retiring_pages * cache.page_size

    def most_losers(self, cache: Any) -> int:
        """Of a row and head. A store that shrinks loses more than comes."""
        return self.most_candidates(cache) - (self.capacity if cache.heads is None else 0)

    def most_winners(self, cache: Any) -> int:
        """Of a row and head. At a quantised store's first event all that stay are moved."""
        return self.retiring_pages * cache.page_size if self.stored is None else self.most_held(cache)

    def most_held(self, cache: Any) -> int:
        """Tokens that a head holds at most."""
        return self.capacity if cache.heads is None else cache.heads.most_tokens


class Sizes(NamedTuple):
    """Compile-time sizes of a head and a page; block_d: dimensions padded to a power of two that a matrix product takes; softcap:
    of the layer's logits, 0: none."""

    page: int
    head_dim: int
    block_d: int
    softcap: float


class RecordSizes(NamedTuple):
    """Compile-time layout of a record (page_layout.py): mean_key to scales count float32 numbers, covariance those of its type;
    floats, covariances: numbers of either type that a head owns of a page."""

    has_covariance: bool
    has_scales: bool
    mean_key: int
    mean_value: int
    spread: int
    scales: int
    covariance: int
    floats: int
    covariances: int


class StoreSizes(NamedTuple):
    """Compile-time layout of quantised store pages (packed_store.py), in the order of CacheView.packed_arguments; 0 bits: there
    are none. centres_at: byte of a record where those of the keys begin, -1: keys have none. own_budgets: of heads, which then
    lie where Tiles.places says."""

    bits: int
    width: int
    block: int
    code_bytes: int
    values_at: int
    scales_at: int
    tile_bytes: int
    page_tiles: int
    centres_at: int
    own_budgets: bool


NO_STORE = StoreSizes(*[0] * (len(StoreSizes._fields) - 2), -1, False)


def tokens_of(cache: Any) -> Tokens:
    return Tokens(cache.keys, cache.values, *cache.keys.stride(), *cache.values.stride())


def records_of(cache: Any) -> Records:
    floats = cache.raw.view(torch.float32)
    covariance = cache.raw.view(_covariance_type(cache)) if cache.record_layout.has_covariance else floats
    return Records(floats, covariance, *floats.stride()[:2], *covariance.stride()[:2])


def record_sizes(cache: Any) -> RecordSizes:
    layout, item, head_bytes = cache.record_layout, _covariance_type(cache).itemsize, cache.raw.shape[2]
    *floats, covariance = layout.offsets
    return RecordSizes(
        layout.has_covariance,
        layout.has_scales,
        *(at // 4 for at in floats),
        covariance // item,
        floats=head_bytes // 4,
        covariances=head_bytes // item,
    )


def tiles_of(cache: Any) -> Tiles:
    heads = cache.heads
    told = [None] * 4 if heads is None else [heads.places, heads.capacity, heads.places.shape[1], heads.equal_tokens]
    return Tiles(cache.raw, cache.raw.view(torch.int16), *cache.raw.stride()[:2], *told)


def event_lists(cache: Any, work: Any) -> EventLists:
    store, retiring = work.store_pages, work.retiring_pages
    by_row, pages = (store.stride(0), retiring.stride(0)), (store.shape[1], retiring.shape[1])
    return EventLists(store, retiring, work.stored, *by_row, *pages, work.capacity(cache.page_size))


def store_sizes(cache: Any, work: Any) -> StoreSizes:
    """Of a work list's rows."""
    return NO_STORE if work.stored is None else StoreSizes(*cache.packed_arguments, cache.heads is not None)


def attending_warps(work: Any) -> int:
    """Of a program. Codes that become numbers take registers: 4 warps would spill some at head dimension 128."""
    return 4 if work.stored is None else 8


def sizes(cache: Any) -> Sizes:
    head_dim = cache.keys.shape[3]
    least = cache.packed_layout.width if cache.packed_layout else 16
    return Sizes(cache.page_size, head_dim, triton.next_power_of_2(max(least, head_dim)), cache.softcap)


def _covariance_type(cache: Any) -> torch.dtype:
    return getattr(torch, cache.record_layout.moment_dtype)
