"""consolidate of several layers in one launch, for rows that the device found due: what a decode step ends with.

A program settles a row's event in a head of a layer, its score included: with all layers at once there are programs enough, and
where nothing is due they find an empty list. The same sums in the same order as score.py and consolidate.py: the same bits.
"""

import torch
import triton
import triton.language as tl

from .arguments import (
    Records,
    Tokens,
    event_lists,
    record_sizes,
    records_of,
    sizes,
    store_sizes,
    tiles_of,
    tokens_of,
)
from .common import LAYER_NUMBERS, moved, program_head
from .consolidate import BLOCK_L, settle
from .event import event_of
from .lent import move_lent, room_for, room_of
from .score import BLOCK_N, record_mean, tile_sums, tile_terms, unit
from .store import tiles_of_layer

ROWS_AT_ONCE = 2
"""Due rows that have programs of their own; more take turns. Few are due at once, unless they came together."""
ALIGNMENT = 16
"""Bytes that layers lie apart by multiples of."""


@triton.jit
def _score(
    terms, t_term, mass, m_page, m_head, event, pages, tokens, tiles, records, head,
    BLOCK_N: tl.constexpr, HAS_ATTENTION: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Writes the terms of all candidates."""
    anchor = tl.zeros((SIZES.block_d,), tl.float32)
    mean = tl.zeros((SIZES.block_d,), tl.float32)
    asks = HAS_ATTENTION and event.before == 0
    for first in range(0, event.candidates, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        of_keys, of_values = tile_sums(tokens, tiles, head, event, i, i < event.candidates, asks, SIZES, STORE)
        anchor += of_keys
        mean += of_values
    anchor = unit(anchor)
    if HAS_ATTENTION:
        if asks:
            mean /= event.candidates
        else:
            mean = record_mean(records, head, pages, SIZES, RECORD)
    for first in range(0, event.candidates, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        tile_terms(
            terms + i, t_term, mass, m_page, m_head, tokens, tiles, head, event, i, i < event.candidates, anchor, mean,
            HAS_ATTENTION, SIZES, STORE,
        )  # fmt: skip


@triton.jit
def _consolidate_layers(
    layers, due, terms, mass, feedback, loser_list, winner_list, lists, lent, moment_pages, num_evicted, tokens, tiles, records,
    t_term, most_losers, most_winners, m_page, m_head, row_moments, sink_tokens, attention_weight,
    RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    TERMS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_MEANS: tl.constexpr, LENDS: tl.constexpr, SIZES: tl.constexpr,
    STORE: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Program (turn, KV head, layer). layers: [layers, 5] bytes from the first layer's cache, mass, places and capacity of heads,
    and feedback of errors in keys to the layer's."""
    head, layer = program_head(), tl.program_id(2)
    count = tl.load(due)
    layers += LAYER_NUMBERS * layer
    by, mass_by = tl.load(layers), tl.load(layers + 1)
    tokens = Tokens(
        moved(tokens.k, by), moved(tokens.v, by), tokens.k_page, tokens.k_head, tokens.k_slot, tokens.k_dim,
        tokens.v_page, tokens.v_head, tokens.v_slot, tokens.v_dim,
    )  # fmt: skip
    tiles = tiles_of_layer(tiles, layers, STORE)
    records = Records(
        moved(records.floats, by), moved(records.covariance, by), records.f_page, records.f_head, records.c_page,
        records.c_head,
    )  # fmt: skip
    mass = moved(mass, mass_by) if HAS_MASS else mass
    feedback = moved(feedback, tl.load(layers + 4)) if feedback is not None else feedback
    place = (layer * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
    terms += place * TERMS * t_term
    loser_list += place * most_losers
    winner_list += place * most_winners
    for j in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(due + 1 + j)
        pages = moment_pages + row * row_moments
        event = event_of(lists, row, num_evicted, tiles, records, head, pages, BLOCK_K, SIZES, STORE, RECORD)
        if event.losers > 0:
            _score(
                terms, t_term, mass + head * m_head, m_page, m_head, event, pages, tokens, tiles, records, head,
                BLOCK_N, TERMS > 1, SIZES, STORE, RECORD,
            )  # fmt: skip
        tl.debug_barrier()
        room = lent
        if LENDS:
            mine = layer * tl.num_programs(1) + head
            room = room_of(lent, row, mine, by, mass_by // 4 + head * m_head, STORE)
        settle(
            terms, t_term, mass, feedback, None, loser_list, winner_list, event, pages, tokens, tiles, records, head, m_page,
            m_head, room, sink_tokens, attention_weight,
            RUNS, RUN, BLOCK_L, BLOCK_L, TERMS, HAS_MASS, HAS_MEANS, LENDS, SIZES, STORE, RECORD,
        )  # fmt: skip
        tl.debug_barrier()


def consolidate_layers(cache, mass, layers: torch.Tensor, work, sink_tokens: int, attention_weight: float) -> None:
    """The native score's events of the rows that `work.due` names, in all layers.

    Args:
        cache, mass: of the first layer; those of the others are of the same shape and strides.
        layers: [layers, 5] int64 on the device, LayersOf.offsets of kernels/worklists.py; multiples of ALIGNMENT.
        attention_weight: as consolidate.
    """
    heads, lists, device = cache.keys.shape[1], event_lists(cache, work), cache.keys.device
    most, num_terms = lists.most_candidates(cache), 2 if attention_weight else 1
    most_losers, (lent, room) = lists.most_losers(cache), room_for(cache, mass, work, lists, len(layers))
    most_winners = lists.most_winners(cache)
    turns = min(ROWS_AT_ONCE, len(work.num_evicted))
    places = len(layers) * heads * turns
    terms = torch.empty(places, num_terms, most, dtype=torch.float32, device=device)
    losers, winners = (torch.empty(places, n, dtype=torch.int32, device=device) for n in (most_losers, most_winners))
    seen = mass if mass is not None else terms
    _consolidate_layers[(turns, heads, len(layers))](
        layers, work.due, terms, seen, cache.feedback, losers, winners, lists, lent, work.moment_pages, work.num_evicted,
        tokens_of(cache), tiles_of(cache), records_of(cache), most, most_losers, most_winners, *seen.stride()[:2],
        work.moment_pages.stride(0), sink_tokens, attention_weight,
        RUNS=triton.next_power_of_2(triton.cdiv(most, work.run_tokens)), RUN=work.run_tokens,
        BLOCK_K=triton.next_power_of_2(lists.retiring_pages), BLOCK_L=BLOCK_L, BLOCK_N=BLOCK_N, TERMS=num_terms,
        HAS_MASS=mass is not None, HAS_MEANS=cache.record_layout.has_means, LENDS=lent is not None, SIZES=sizes(cache),
        STORE=store_sizes(cache, work), RECORD=record_sizes(cache), num_warps=8,
    )  # fmt: skip
    if room:
        move_lent(cache, mass, work, lists, lent, layers)
