"""The candidates of one event: numbered through the store's tokens, then those of the retiring pages.

The first `packed` of them lie in quantised tiles, all others in exact pages: those of a store that is not quantised, or not
yet, and the retiring ones.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .store import rotated, stored_keys, stored_values, tiles_at


class Event(NamedTuple):
    """One row's: its pages, and numbers of tokens.

    exact:      of the store that lie in exact pages.
    filled:     in the store, each in the slot of its number.
    candidates: 0 if the row retires nothing; losers: how many of them go.
    """

    store: tl.tensor
    retiring: tl.tensor
    packed: tl.tensor
    exact: tl.tensor
    filled: tl.tensor
    candidates: tl.tensor
    losers: tl.tensor


@triton.jit
def event_of(
    store, retiring, stored, row, row_store, row_retiring, store_pages, num_retiring, capacity,
    BLOCK_K: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Of a row; its list of retiring pages ends in -1 where it retires fewer than num_retiring."""
    k = tl.arange(0, BLOCK_K)
    retiring += row * row_retiring
    due = tl.sum((tl.load(retiring + k, mask=k < num_retiring, other=-1) >= 0).to(tl.int32), 0)
    exact = tl.full((), 0, tl.int32) + store_pages * SIZES.page
    packed, filled = exact * 0, exact
    if STORE.bits:
        packed = tl.load(stored + row).to(tl.int32)
        exact = tl.where(packed > 0, 0, exact)
        filled = packed
    candidates = tl.where(due > 0, packed + exact + due * SIZES.page, 0)
    losers = tl.maximum(candidates - capacity, 0)
    return Event(store + row * row_store, retiring, packed, exact, filled, candidates, losers)


@triton.jit
def exact_slots(event, i, real, SIZES: tl.constexpr):
    """(pages, slots) [N] of candidates i that lie in exact pages."""
    i -= event.packed
    in_store = i < event.exact
    of_store = tl.load(event.store + i // SIZES.page, mask=real & (i >= 0) & in_store, other=0)
    of_retiring = tl.load(event.retiring + (i - event.exact) // SIZES.page, mask=real & (in_store == 0), other=0)
    return tl.where(in_store, of_store, of_retiring).to(tl.int64), i % SIZES.page


@triton.jit
def store_slots(event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """(pages, slots) [N] of the store's slots i as they are after the event."""
    PAGE: tl.constexpr = STORE.page_tiles * 8 if STORE.bits else SIZES.page
    return tl.load(event.store + i // PAGE, mask=real, other=0).to(tl.int64), i % PAGE


@triton.jit
def mass_at(mass, m_page, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Pointers [N] to what was observed of candidates i; mass: of the head."""
    page, slot = exact_slots(event, i, real, SIZES)
    if STORE.bits:
        inside = i < event.packed
        of_store, store_slot = store_slots(event, i, real & inside, SIZES, STORE)
        page, slot = tl.where(inside, of_store, page), tl.where(inside, store_slot, slot)
    return mass + page * m_page + slot


@triton.jit
def load_keys(tokens, tiles, head, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Keys [N, D] float32 of candidates i, zero where not `real`."""
    d = tl.arange(0, SIZES.block_d)
    page, slot = exact_slots(event, i, real, SIZES)
    mask = (real & (i >= event.packed))[:, None] & (d < SIZES.head_dim)[None, :]
    at = tokens.k + head * tokens.k_head + (page * tokens.k_page + slot * tokens.k_slot)[:, None]
    x = tl.load(at + (d * tokens.k_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
    if STORE.bits:
        inside = real & (i < event.packed)
        tile = tiles_at(tiles, head, event.store, i, inside, STORE)
        y = rotated(tl.trans(stored_keys(tiles, tile, i, inside, SIZES.block_d, STORE)), STORE.block)
        x = tl.where(inside[:, None] & (d < SIZES.head_dim)[None, :], y, x)
    return x


@triton.jit
def load_values(tokens, tiles, head, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Values, likewise."""
    d = tl.arange(0, SIZES.block_d)
    page, slot = exact_slots(event, i, real, SIZES)
    mask = (real & (i >= event.packed))[:, None] & (d < SIZES.head_dim)[None, :]
    at = tokens.v + head * tokens.v_head + (page * tokens.v_page + slot * tokens.v_slot)[:, None]
    x = tl.load(at + (d * tokens.v_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
    if STORE.bits:
        inside = real & (i < event.packed)
        tile = tiles_at(tiles, head, event.store, i, inside, STORE)
        y = rotated(stored_values(tiles, tile, i, inside, SIZES.block_d, STORE), STORE.block)
        x = tl.where(inside[:, None] & (d < SIZES.head_dim)[None, :], y, x)
    return x
