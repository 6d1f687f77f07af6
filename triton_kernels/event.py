"""The candidates of one event: numbered through the store's tokens, then those of the retiring pages.

The first `packed` of them lie in quantised tiles, all others in exact pages: those of a store that is not quantised, or not
yet, and the retiring ones.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .centres import load_centres, of_slots
from .retained import exact_keys, exact_values
from .store import kept_tokens, observed_at, rotated, stored_keys, stored_values, tiles_at


class Event(NamedTuple):
    """One row's in a head: its pages, and numbers of tokens.

    exact:      of the store that lie in exact pages.
    filled:     in the store, each in the slot of its number, where it stays unless it goes; of a store that shrinks, those that
                have a slot afterwards.
    candidates: 0 if the row retires nothing; losers: how many of them go.
    before:     evicted before, float32.
    first_key, others: centres [D] of the keys of one head's quantised store.
    """

    store: tl.tensor
    retiring: tl.tensor
    packed: tl.tensor
    exact: tl.tensor
    filled: tl.tensor
    candidates: tl.tensor
    losers: tl.tensor
    before: tl.tensor
    first_key: tl.tensor
    others: tl.tensor


@triton.jit
def event_of(
    lists, row, num_evicted, tiles, records, head, record_pages,
    BLOCK_K: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Of a row and head; the row's list of retiring pages ends in -1 where it retires fewer than others."""
    k = tl.arange(0, BLOCK_K)
    retiring = lists.retiring + row * lists.row_retiring
    due = tl.sum((tl.load(retiring + k, mask=k < lists.retiring_pages, other=-1) >= 0).to(tl.int32), 0)
    exact = tl.full((), 0, tl.int32) + lists.store_pages * SIZES.page
    filled, capacity = exact, lists.capacity
    packed, before = kept_tokens(lists.stored, num_evicted, row, tiles, head, STORE)
    if STORE.bits:
        exact = tl.where(packed > 0, 0, exact)
        filled = packed
    candidates = tl.where(due > 0, packed + exact + due * SIZES.page, 0)
    if STORE.own_budgets:
        gone = candidates + before.to(tl.int32)
        capacity = tl.where(gone > tiles.equal_tokens, tl.load(tiles.capacity + head).to(tl.int32), capacity)
    losers = tl.maximum(candidates - capacity, 0)
    if STORE.own_budgets:
        filled = tl.minimum(filled, candidates - losers)
    first_key, others = load_centres(records, head, record_pages, SIZES, STORE, RECORD)
    store = lists.store + row * lists.row_store
    return Event(store, retiring, packed, exact, filled, candidates, losers, before, first_key, others)


@triton.jit
def exact_slots(event, i, real, SIZES: tl.constexpr):
    """(pages, slots) [N] of candidates i that lie in exact pages."""
    i -= event.packed
    in_store = i < event.exact
    of_store = tl.load(event.store + i // SIZES.page, mask=real & (i >= 0) & in_store, other=0)
    of_retiring = tl.load(event.retiring + (i - event.exact) // SIZES.page, mask=real & (in_store == 0), other=0)
    return tl.where(in_store, of_store, of_retiring).to(tl.int64), i % SIZES.page


@triton.jit
def store_slots(event, tiles, head, m_head, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """(pages, slots) [N] of the store's slots i as they are after the event; of a quantised one, where it is observed."""
    column, slot = i // SIZES.page, i % SIZES.page
    if STORE.bits:
        column, slot = observed_at(tiles, head, m_head, i, real, STORE)
    return tl.load(event.store + column, mask=real, other=0).to(tl.int64), slot


@triton.jit
def mass_at(mass, m_page, m_head, tiles, head, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Pointers [N] to what was observed of candidates i; mass: of the head."""
    page, slot = exact_slots(event, i, real, SIZES)
    if STORE.bits:
        inside = i < event.packed
        of_store, store_slot = store_slots(event, tiles, head, m_head, i, real & inside, SIZES, STORE)
        page, slot = tl.where(inside, of_store, page), tl.where(inside, store_slot, slot)
    return mass + page * m_page + slot


@triton.jit
def _or_stored(x, y, inside, SIZES: tl.constexpr, STORE: tl.constexpr):
    """x [N, D], but where `inside` the store's rotated numbers y."""
    d = tl.arange(0, SIZES.block_d)
    return tl.where(inside[:, None] & (d < SIZES.head_dim)[None, :], rotated(y, STORE.block), x)


@triton.jit
def load_keys(tokens, tiles, head, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Keys [N, D] float32 of candidates i, zero where not `real`."""
    page, slot = exact_slots(event, i, real, SIZES)
    x = tl.trans(exact_keys(tokens, head, page, slot, real & (i >= event.packed), SIZES)).to(tl.float32)
    if STORE.bits:
        inside = real & (i < event.packed)
        tile = tiles_at(tiles, head, event.store, i, inside, STORE)
        x = _or_stored(x, tl.trans(stored_keys(tiles, tile, i, inside, SIZES.block_d, STORE)), inside, SIZES, STORE)
        x = tl.where(inside[:, None], x + of_slots(event.first_key, event.others, i), x)
    return x


@triton.jit
def load_values(tokens, tiles, head, event, i, real, SIZES: tl.constexpr, STORE: tl.constexpr):
    """Values, likewise."""
    page, slot = exact_slots(event, i, real, SIZES)
    x = exact_values(tokens, head, page, slot, real & (i >= event.packed), SIZES).to(tl.float32)
    if STORE.bits:
        inside = real & (i < event.packed)
        tile = tiles_at(tiles, head, event.store, i, inside, STORE)
        x = _or_stored(x, stored_values(tiles, tile, i, inside, SIZES.block_d, STORE), inside, SIZES, STORE)
    return x
