"""consolidate: choose who goes, fold them into the record, fill their slots. One program a (row, KV head); where errors of keys
are fed back, one a tile fills the slots.

Three barriers order what may share memory: the lists before they are read, losers read before winners move over them, and
winners read before the record is written, which at a sequence's first event lies in retiring pages.
"""

import torch
import triton
import triton.language as tl

from .arguments import event_lists, record_sizes, records_of, sizes, store_sizes, tiles_of, tokens_of
from .centres import finite, of_slots, write_centres
from .choose import choose
from .common import LAYER_NUMBERS, program_head
from .event import event_of, exact_slots, load_keys, load_values, mass_at, store_slots
from .fold import fold, merged, write_record
from .lent import move_lent, room_for, room_of, waiting
from .score import score_terms
from .store import TILE, move_stored, stored_bytes, tiles_at, write_stored

BLOCK_L = 16
"""Losers folded, and winners moved, at a time."""


@triton.jit
def _copy(tokens, head, page, slot, to_page, to_slot, ok, SIZES: tl.constexpr):
    """Tokens [N] to other slots, bit for bit."""
    d = tl.arange(0, SIZES.block_d)
    tile = ok[:, None] & (d < SIZES.head_dim)[None, :]
    keys, values = tokens.k + head * tokens.k_head, tokens.v + head * tokens.v_head
    k_dim, v_dim = (d * tokens.k_dim)[None, :], (d * tokens.v_dim)[None, :]
    k = tl.load(keys + (page * tokens.k_page + slot * tokens.k_slot)[:, None] + k_dim, mask=tile)
    v = tl.load(values + (page * tokens.v_page + slot * tokens.v_slot)[:, None] + v_dim, mask=tile)
    tl.store(keys + (to_page * tokens.k_page + to_slot * tokens.k_slot)[:, None] + k_dim, k, mask=tile)
    tl.store(values + (to_page * tokens.v_page + to_slot * tokens.v_slot)[:, None] + v_dim, v, mask=tile)


@triton.jit
def _centres(tokens, tiles, head, event, BLOCK_L: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr):
    """(first key, mean of those behind the first tile) [D] of the candidates of a store's first event, else as they are."""
    first_key, others = event.first_key, event.others
    if event.packed == 0:
        total = tl.zeros((SIZES.block_d,), tl.float64)
        for first in range(0, event.candidates, BLOCK_L):
            i = first + tl.arange(0, BLOCK_L)
            keys = finite(load_keys(tokens, tiles, head, event, i, i < event.candidates, SIZES, STORE))
            total += tl.sum(tl.where((i >= TILE)[:, None], keys, 0.0).to(tl.float64), 0)
            first_key = tl.where(first == 0, tl.sum(tl.where((i == 0)[:, None], keys, 0.0), 0), first_key)
        others = (total / tl.maximum(event.candidates - TILE, 1)).to(tl.float32)
    return first_key, others


@triton.jit
def _fill(
    begin, end, tokens, tiles, head, event, first_key, others, loser_list, winner_list, holes, winners, mass, m_page, m_head,
    lent, feedback,
    BLOCK_W: tl.constexpr, HAS_MASS: tl.constexpr, LENDS: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The i-th token outside of the store that stays takes the i-th empty slot: those of the losers, then those never filled;
    from token `begin` on, those before `end`.

    At a quantised store's first event the tokens come from the very pages that they are packed into. Slots fill in order, a
    packed token needs less room than an exact one, and what is moved together is read before any of it is written. LENDS: what
    goes into tiles of other heads then waits in `lent`. A store that shrinks moves tokens that are packed already.
    """
    for first in range(begin, end, BLOCK_W):
        j = first + tl.arange(0, BLOCK_W)
        ok = j < winners
        source = tl.load(winner_list + j, mask=ok, other=0)
        hole = tl.load(loser_list + j, mask=ok & (j < holes), other=0)
        slot = tl.where(j < holes, hole, event.filled + j - holes)
        if HAS_MASS:
            seen = tl.load(mass_at(mass, m_page, m_head, tiles, head, event, source, ok, SIZES, STORE), mask=ok)
        to_page, to_slot = store_slots(event, tiles, head, m_head, slot, ok, SIZES, STORE)
        to_mass = to_page * m_page + to_slot
        if STORE.bits:
            fresh = ok
            if STORE.own_budgets:
                packed = ok & (source < event.packed)
                fresh = ok & (source >= event.packed)
                tile = tiles_at(tiles, head, event.store, source, packed, STORE)
                moved = stored_bytes(tiles, tile, source, packed, SIZES.block_d, STORE)
            keys = load_keys(tokens, tiles, head, event, source, fresh, SIZES, STORE)
            keys -= of_slots(first_key, others, slot)
            values = load_values(tokens, tiles, head, event, source, fresh, SIZES, STORE)
            to = tiles_at(tiles, head, event.store, slot, ok, STORE)
            if LENDS:
                waits, to_wait, mass_waits = waiting(lent, event, slot, STORE)
                to, to_mass = tl.where(waits, to_wait, to), tl.where(waits, mass_waits, to_mass)
            tl.debug_barrier()
            write_stored(tiles, to, slot, fresh, keys, values, feedback, STORE)
            if STORE.own_budgets:
                move_stored(tiles, to, slot, packed, moved, STORE)
        else:
            page, page_slot = exact_slots(event, source, ok, SIZES)
            _copy(tokens, head, page, page_slot, to_page, to_slot, ok, SIZES)
        if HAS_MASS:
            tl.store(mass + to_mass, seen, mask=ok)


@triton.jit
def _fill_tiles(
    counts, mass, feedback, loser_list, winner_list, num_evicted, lists, moment_pages, tokens, tiles, records,
    l_row, l_head, w_row, w_head, m_page, m_head, row_moments,
    BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, HAS_MASS: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head, tile): what `_consolidate` has left. Of a store that was quantised before, nothing that is read is
    written, so tiles may run at the same time. A store that shrinks has more of them than programs."""
    row, head, own = tl.program_id(0), program_head(), tl.program_id(2) * BLOCK_W
    counts += 2 * (row * tl.num_programs(1) + head)
    winners = tl.load(counts + 1)
    if own >= winners:
        return
    pages = moment_pages + row * row_moments
    event = event_of(lists, row, num_evicted, tiles, records, head, pages, BLOCK_K, SIZES, STORE, RECORD)
    feedback += head * STORE.width * STORE.width
    for first in range(own, winners, tl.num_programs(2) * BLOCK_W):
        _fill(
            first, tl.minimum(first + BLOCK_W, winners), tokens, tiles, head, event, event.first_key, event.others,
            loser_list + row * l_row + head * l_head, winner_list + row * w_row + head * w_head, tl.load(counts), winners,
            mass + head * m_head, m_page, m_head, None, feedback, BLOCK_W, HAS_MASS, False, SIZES, STORE,
        )  # fmt: skip


@triton.jit
def _consolidate(
    score, mass, feedback, counts, loser_list, winner_list, lent, num_evicted, lists, moment_pages, tokens, tiles, records,
    s_row, s_head, s_term, l_row, l_head, w_row, w_head, m_page, m_head, row_moments, sink_tokens, attention_weight,
    RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr,
    TERMS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_MEANS: tl.constexpr, LENDS: tl.constexpr, SIZES: tl.constexpr,
    STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head). counts: [rows, heads, 2] of `settle`, or None."""
    row, head = tl.program_id(0), program_head()
    pages = moment_pages + row * row_moments
    if counts is not None:
        counts += 2 * (row * tl.num_programs(1) + head)
        tl.store(counts + 1, 0)
    event = event_of(lists, row, num_evicted, tiles, records, head, pages, BLOCK_K, SIZES, STORE, RECORD)
    if event.candidates == 0:
        return
    if LENDS:
        lent = room_of(lent, row, head, 0, head * m_head, STORE)
    settle(
        score + row * s_row + head * s_head, s_term, mass, feedback, counts, loser_list + row * l_row + head * l_head,
        winner_list + row * w_row + head * w_head, event, pages, tokens, tiles, records, head, m_page, m_head, lent,
        sink_tokens, attention_weight,
        RUNS, RUN, BLOCK_L, BLOCK_W, TERMS, HAS_MASS, HAS_MEANS, LENDS, SIZES, STORE, RECORD,
    )  # fmt: skip


@triton.jit
def settle(
    score, s_term, mass, feedback, counts, loser_list, winner_list, event, pages, tokens, tiles, records, head, m_page, m_head,
    lent, sink_tokens, attention_weight,
    RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, TERMS: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_MEANS: tl.constexpr, LENDS: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """One row's event in a head: choose, fold, fill, write the record, a barrier between each. feedback: [heads, width, width] or
    None (store.py); counts: [2] of empty slots and of tokens that want one, which a store that was quantised before leaves to
    `_fill_tiles`; None: it does not."""
    holes, winners = choose(
        score, s_term, event, sink_tokens, attention_weight, loser_list, winner_list, RUNS, RUN, TERMS
    )
    tl.debug_barrier()
    if HAS_MEANS:
        mean_key, mean_value, spread, covariance = fold(
            tokens, tiles, head, event, loser_list, BLOCK_L, SIZES, STORE, RECORD.has_covariance
        )
        mean_key, mean_value, spread, covariance = merged(
            records, head, pages, event.before, event.losers, mean_key, mean_value, spread, covariance, SIZES, RECORD
        )
    first_key, others = event.first_key, event.others
    if STORE.centres_at >= 0:
        first_key, others = _centres(tokens, tiles, head, event, BLOCK_L, SIZES, STORE)
    if feedback is not None:
        feedback += head * STORE.width * STORE.width
    tl.debug_barrier()
    end = winners
    if counts is not None:
        left = event.packed > 0
        tl.store(counts, holes)
        tl.store(counts + 1, tl.where(left, winners, 0))
        end = tl.where(left, 0, winners)
    _fill(
        0, end, tokens, tiles, head, event, first_key, others, loser_list, winner_list, holes, winners, mass + head * m_head,
        m_page, m_head, lent, feedback, BLOCK_W, HAS_MASS, LENDS, SIZES, STORE,
    )  # fmt: skip
    tl.debug_barrier()
    if STORE.centres_at >= 0 and (event.packed == 0) & (event.candidates > 0):
        write_centres(records, head, pages, first_key, others, SIZES, STORE, RECORD)
    if HAS_MEANS and event.losers > 0:
        write_record(records, head, pages, mean_key, mean_value, spread, covariance, SIZES, RECORD)


def consolidate(cache, mass, work, score, sink_tokens: int, attention_weight: float) -> None:
    """As kernels/base.py.

    Args:
        mass: [num_pages, num_kv_heads, slots of a page] float32 observed attention, which moves along with the tokens; or None.
        score: [rows, heads, candidates] float32 of any policy; None: the native one, or none because nothing is evicted.
        attention_weight: of the native score's second term; 0: it has none, nothing of `mass` is read.
    """
    rows, heads = len(work.num_evicted), cache.keys.shape[1]
    lists = event_lists(cache, work)
    if lists.retiring_pages == 0:
        return
    most = lists.most_candidates(cache)
    is_native = score is None and work.evicts
    if is_native:
        terms = score_terms(cache, mass if attention_weight else None, work, lists)
    else:
        terms = torch.zeros(rows, heads, 1, most, device=cache.keys.device) if score is None else score.unsqueeze(2)
    losers, winners = (
        torch.empty(rows, heads, n, dtype=torch.int32, device=cache.keys.device)
        for n in (lists.most_losers(cache), lists.most_winners(cache))
    )
    moved, (lent, room) = mass if mass is not None else terms, room_for(cache, mass, work, lists, 1)
    # Feeding errors back takes several times as long as all else that a tile of tokens needs: each has a program of its own.
    counts = (
        torch.empty(rows, heads, 2, dtype=torch.int32, device=cache.keys.device) if cache.feedback is not None else None
    )
    given = work.num_evicted, lists, work.moment_pages, tokens_of(cache), tiles_of(cache), records_of(cache)
    strides = *losers.stride()[:2], *winners.stride()[:2], *moved.stride()[:2], work.moment_pages.stride(0)
    known = {
        "BLOCK_K": triton.next_power_of_2(lists.retiring_pages), "BLOCK_W": _moved_together(cache),
        "HAS_MASS": mass is not None, "SIZES": sizes(cache), "STORE": store_sizes(cache, work), "RECORD": record_sizes(cache),
    }  # fmt: skip
    _consolidate[(rows, heads)](
        terms, moved, cache.feedback, counts, losers, winners, lent, *given, *terms.stride()[:3], *strides, sink_tokens,
        attention_weight,
        RUNS=triton.next_power_of_2(triton.cdiv(most, work.run_tokens)), RUN=work.run_tokens, BLOCK_L=BLOCK_L,
        TERMS=terms.shape[2] if is_native else 0, HAS_MEANS=cache.record_layout.has_means, LENDS=lent is not None, num_warps=8,
        **known,
    )  # fmt: skip
    if counts is not None:
        tiles = triton.cdiv(lists.retiring_pages * cache.page_size, known["BLOCK_W"])
        _fill_tiles[(rows, heads, tiles)](
            counts, moved, cache.feedback, losers, winners, *given, *strides, num_warps=8, **known
        )
    if room:
        only = torch.zeros(1, LAYER_NUMBERS.value, dtype=torch.int64, device=cache.keys.device)
        move_lent(cache, mass, work, lists, lent, only)


def _moved_together(cache) -> int:
    """In vLLM's CPU layout (the interpreter's tests) a page's tokens are interleaved: packing one must wait for all."""
    return BLOCK_L if cache.keys.stride(3) == 1 else max(BLOCK_L, triton.next_power_of_2(cache.page_size))
