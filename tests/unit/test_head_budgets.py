"""What heads hold where they do not hold the same, and where it lies."""

import pytest
import torch

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import LEAST_SHARE, HeadBudgets, Sizes, Tile, budgets, least_tokens, shared, tiles_of
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.page_schedule import PageSchedule

STORE, GRAIN, LONGEST = 96, 8, 4096


def reach_of(layers=6, heads=4, seed=0):
    return torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_heads_hold_what_layers_before_them_can_lend(seed):
    capacity = shared(reach_of(seed=seed), STORE, GRAIN, LONGEST)
    equal = torch.full_like(capacity, STORE)
    assert capacity.sum() == equal.sum(), "everything is given away"
    assert (capacity.sum(1).cumsum(0) <= equal.sum(1).cumsum(0)).all()
    assert (capacity % GRAIN == 0).all() and capacity.min() >= STORE // LEAST_SHARE // GRAIN * GRAIN


def test_who_looks_further_holds_more():
    reach = reach_of()
    capacity = shared(reach, STORE, GRAIN, LONGEST)
    for of_layer, held in zip(reach, capacity, strict=True):
        assert (held[of_layer.argsort()].diff() >= -GRAIN).all()
    # The layer that looks furthest is the last one: nothing keeps it from taking from all others.
    reach[-1] = 1.0
    assert shared(reach, STORE, GRAIN, LONGEST)[-1].min() > capacity.float().mean()
    # Were it the first one, no earlier layer could lend to it.
    reach = reach.flip(0)
    assert shared(reach, STORE, GRAIN, LONGEST)[0].sum() == STORE * reach.shape[1]


def test_no_head_holds_more_than_the_longest_sequence_has():
    reach = torch.tensor([[0.0, 0.0, 0.01, 1.0]])
    capacity = shared(reach, STORE, GRAIN, longest=150)
    assert capacity.max() == 152 and capacity.sum() == 4 * STORE
    assert shared(reach, STORE, GRAIN, longest=STORE).unique().tolist() == [STORE]


def test_equal_reach_is_an_equal_share():
    assert shared(torch.full((3, 2), 0.4), STORE, GRAIN, LONGEST).unique().tolist() == [STORE]
    for nothing in (0.0, torch.nan):  # weights that are no numbers measure nothing
        assert shared(torch.full((3, 2), nothing), STORE, GRAIN, LONGEST).unique().tolist() == [STORE]


@pytest.mark.parametrize("grain", [8, 16])
def test_nobody_holds_nothing(grain):
    assert least_tokens(776, grain) == 776 // LEAST_SHARE // grain * grain
    assert least_tokens(16, grain) == grain


def test_heads_evict_what_they_do_not_hold():
    """Of 96 tokens that every head would hold, 80 are held by all; then each has its own capacity."""
    heads = HeadBudgets(torch.tensor([32, 96, 160]), torch.zeros(3, 20, 3, dtype=torch.int64), equal_tokens=80)
    gone = torch.tensor([0, 80, 96, 120, 200])
    evicted = heads.evicted(gone.clamp(max=96), (gone - 96).clamp(min=0).float())
    assert evicted.tolist() == [[0, 0, 0], [0, 0, 0], [64, 0, 0], [88, 24, 0], [168, 104, 40]]


def test_no_tile_lies_before_the_first_page():
    heads = HeadBudgets(torch.tensor([8]), torch.tensor([[[-1, 0, 0]]]), equal_tokens=0)
    with pytest.raises(ValueError, match="page -1"):
        _ = heads.pages


@pytest.mark.parametrize("seed", range(4))
def test_a_tile_is_held_once_and_lent_to_no_earlier_layer(seed):
    page_tiles, own = 7, STORE // 8
    capacity = shared(reach_of(seed=seed), STORE, GRAIN, LONGEST)
    tiles = tiles_of(capacity, STORE, page_tiles)
    held = [
        tile
        for heads, of_layer in zip(tiles, capacity.tolist(), strict=True)
        for head, tokens in zip(heads, of_layer, strict=True)
        for tile in head[: tokens // 8]
    ]
    assert len(held) == len(set(held)) == capacity.sum() // 8
    for layer, heads in enumerate(tiles):
        for head, mine in enumerate(heads):
            assert len(mine) == max(own, capacity[layer, head] // 8)
            first = [Tile(layer, head, n // page_tiles, n % page_tiles) for n in range(own)]
            assert mine[:own] == first, "its own first, from its first page on"
            assert all(tile.layer <= layer for tile in mine)
            assert all(tile.page * page_tiles + tile.number < own for tile in mine), "the record's tiles are nobody's"


def test_kernels_are_told_bytes_and_observations():
    tiles = [
        [[Tile(0, 0, 0, 0)], [Tile(0, 1, 0, 0), Tile(0, 1, 1, 2)]],
        [[Tile(1, 0, 0, 0), Tile(0, 0, 3, 1)], [Tile(1, 1, 0, 0)]],
    ]
    addresses = torch.tensor([[10_000, 400], [90_000, 480]])
    sizes = Sizes(part_bytes=1000, part_slots=56, tile_bytes=100)
    first, second = budgets(torch.tensor([[8, 16], [16, 8]]), tiles, addresses, sizes, 40)
    assert first.capacity.tolist() == [8, 16] and second.capacity.tolist() == [16, 8]
    assert first.places.tolist() == [[[0, 0, 0]] * 2, [[0, 1000, 56], [1, 1200, 72]]]
    assert (first.pages, second.pages) == (2, 4)
    assert second.places.tolist() == [[[0, 0, 0], [3, 100 - 80_000, 8 - 20]], [[0, 1000, 56]] * 2]


@pytest.mark.parametrize("prompt", [0, 300, 5000])
@pytest.mark.parametrize(
    ("options", "first_lends"),
    [
        ({"budget_tokens": 1024}, False),
        ({"budget_tokens": 256, "store_dtype": "int8"}, False),
        ({"budget_tokens": 1024, "prefill_retire_tokens": 512}, False),
        # No event leaves all heads equal then.
        ({"budget_tokens": 512, "prefill_retire_tokens": 4096}, False),
        ({"budget_tokens": 512, "correction": "first"}, False),
        ({"budget_tokens": 128, "window_tokens": 80, "retire_tokens": 16}, False),
        ({"budget_tokens": 64, "store_dtype": "int8"}, True),
    ],
)
def test_no_tile_is_read_and_written_in_one_event(options, first_lends, prompt):
    """By different heads, of prompts that are read in steps; heads and layers may then do their event in any order. A first event
    that takes more than an equal share is the exception that kernels know: `first_retired_tokens` tells them."""
    settings = {
        "policy": "momentkv",
        "store_dtype": "int4",
        "run_tokens": 8,
        "head_budgets": "measured",
        "prefill": "chunked",
    }
    schedule = StateLayout.of(EvictionConfig.from_dict(settings | options), 16, 64, torch.bfloat16).schedule
    capacity = shared(reach_of(layers=3), schedule.store_tokens, GRAIN, LONGEST)
    tiles = tiles_of(capacity, schedule.store_tokens, max(1, schedule.store_page_tokens // 8))
    lent, before = 0, 0
    for number, event in enumerate(schedule.events(0, 6000, prompt)):
        after = schedule.boundary_column(event, prompt) * schedule.page_size
        read, written = ({}, {})
        for layer, heads in enumerate(tiles):
            for head, held in enumerate(heads):
                mine = int(capacity[layer, head])
                had, has = (held_of(schedule, mine, gone) for gone in (before, after))
                # A first event reads exact tokens, which lie in all that will be the head's own.
                reads = held[: had // 8] if before else held[: schedule.store_tokens // 8]
                read |= dict.fromkeys(reads, (layer, head))
                written |= {tile: (layer, head) for tile in held[: has // 8]}
                lent += sum((tile.layer, tile.head) != (layer, head) for tile in held[: has // 8])
        both = [tile for tile in written if read.get(tile, written[tile]) != written[tile]]
        assert bool(both) == (number == 0 and first_lends)
        if number == 0:
            assert schedule.first_retired_tokens == after and (after > schedule.store_tokens) == first_lends
        before = after
    assert lent


def held_of(schedule: PageSchedule, capacity: int, gone: int) -> int:
    return gone if gone <= schedule.equal_tokens else min(gone, capacity)
