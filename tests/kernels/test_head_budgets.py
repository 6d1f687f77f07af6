"""Heads that hold different numbers of tokens, in tiles of other heads and layers: each is what the reference makes of it alone."""

import ctypes

import pytest
import torch
from kernel_cases import INTERPRETED, run_both

from momentkv_vllm.head_budgets import equal_until, shared
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.packed_store import PackedLayout
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find

LAYERS, HEADS, PAGE, PAGES = 2, 3, 16, 40
D, PAGES_READ, LARGE = (32, 8, 5) if INTERPRETED else (64, 22, 12)
SCALE = D**-0.5
MOMENT_PAGE = PAGES - 1


@pytest.fixture(autouse=True)
def attention_counts_alike(monkeypatch):
    """What it counts follows from an equal share of the store; a head alone has its own."""
    monkeypatch.setattr("momentkv_vllm.policies.key_direction.FEW_RUNS", 0)


def store_pages_of(dtype: str) -> int:
    return 1 if INTERPRETED and dtype == "int4" else 2


class Sequence:
    """One sequence's pages 1, 2, ... in some layers; heads hold `capacity` tokens each, all others `store_tokens`."""

    def __init__(
        self, family: str, policy: str, dtype: str, layers: int, heads: int, extra_pages: int = 0, first: int = 0,
        softcap: float = 0.0, numbers: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.kernels, self.policy = select(family), find(policy)()
        # A large first event finds them among its own pages.
        self.store_pages = store_pages_of(dtype) + (extra_pages if first else 0)
        self.extra = [] if first else list(range(PAGES, PAGES + extra_pages))
        shape = (PAGES + extra_pages, heads, PAGE, 2 * D)
        record = RecordLayout(D, has_covariance=False, has_centres=True)
        self.caches = [
            CacheView.of_vllm_cpu(torch.zeros(shape, dtype=numbers), record, PackedLayout(dtype, D), softcap)
            for _ in range(layers)
        ]
        self.observed = [Observed.of(cache, "mass") for cache in self.caches]
        self.restart = True

    def write(self, layer: int, at: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = PAGE + at + torch.arange(len(keys))
        self.kernels.write(self.caches[layer], keys, values, slots, self.observed[layer])

    def attend(self, layer: int, queries: torch.Tensor, at: int, boundary: int, stored: int, evicted: int):
        store = [*range(1, 1 + self.store_pages), *self.extra] if boundary else []
        pages = [*store, *range(1 + boundary, 1 + -(-(at + len(queries)) // PAGE))]
        work = AttendWork(
            first_token=torch.tensor([0]), num_queries=torch.tensor([len(queries)]), pages=torch.tensor([pages]),
            last_slot=torch.tensor([at - boundary * PAGE]), moment_pages=torch.tensor([[MOMENT_PAGE]]),
            num_evicted=torch.tensor([float(evicted)]), stored=torch.tensor([stored]), store_pages=len(store) or self.store_pages,
            observe_from=torch.tensor([0]), restart=torch.tensor([True]),
        )  # fmt: skip
        given, changed = (
            (self.observed[layer], queries, work, SCALE, True),
            [observed.data for observed in self.observed],
        )
        output, lse = run_both(self.kernels, self.caches[layer], *given, changed)
        return output.float(), lse

    def retire(self, layer: int, boundary: int, after: int, stored: int, evicted: int, store_tokens: int) -> None:
        store = [*range(1, 1 + self.store_pages), *(self.extra if boundary else [])]
        retiring = [*range(1 + (boundary or self.store_pages), 1 + after)]
        work = RetireWork(
            store_pages=torch.tensor([store]), retiring_pages=torch.tensor([retiring]),
            moment_pages=torch.tensor([[MOMENT_PAGE]]), num_evicted=torch.tensor([float(evicted)]), run_tokens=8,
            stored=torch.tensor([stored]), store_tokens=store_tokens,
        )  # fmt: skip
        self.kernels.consolidate(self.caches[layer], self.observed[layer], work, self.policy, 4, SCALE)


def tiles_held(cache: CacheView, head: int, tiles: int) -> list[torch.Tensor]:
    """Bytes of the tiles that a head holds, wherever they are."""
    page, size = cache.raw[0].numel(), cache.packed.layout.tile_bytes
    addresses = [
        cache.kv.data_ptr() + (1 + column) * page + at for column, at, _ in cache.heads.places[head, :tiles].tolist()
    ]
    return [torch.frombuffer(bytearray(ctypes.string_at(at, size)), dtype=torch.uint8) for at in addresses]


@pytest.mark.parametrize("family", ["triton" if INTERPRETED else "cpu"])
@pytest.mark.parametrize(
    ("dtype", "policy", "first", "softcap"),
    [
        ("int4", "momentkv", 0, 0.0),
        pytest.param("int8", "momentkv", 0, 0.0, marks=pytest.mark.slow),
        ("int4", "keydiff", 0, 0.0),
        pytest.param("int4", "momentkv", 0, 2.0, marks=pytest.mark.slow),
        ("int4", "momentkv", LARGE, 0.0),
        ("int8", "keydiff", LARGE + 3 * INTERPRETED, 0.0),
        ("int8", "momentkv", LARGE + 3 * INTERPRETED, 2.0),
    ],
)
def test_every_head_is_what_the_reference_makes_of_it_alone(family, dtype, policy, first, softcap):
    """first: pages after which the first event comes, which then retires all but one of them; 0: as soon as it can."""
    reach = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.05, 1.0]])
    # What matrix units round would decide between runs that are nearly as good, where attention counts.
    units = family == "cpu" and select("cpu").isa() == "amx"
    numbers = torch.float32 if units and policy == "momentkv" else torch.bfloat16
    ours = Sequence(family, policy, dtype, LAYERS, HEADS, softcap=softcap, numbers=numbers)
    packed = ours.caches[0].packed
    store_pages = store_pages_of(dtype)
    store_tokens = store_pages * packed.page_tokens
    capacity = shared(reach, store_tokens, 8, longest=10_000)
    assert capacity.unique().numel() > 3 and (capacity[1].sum() > HEADS * store_tokens), "a layer lends to the next"
    held = budgets_in(ours.caches, ours.observed, capacity, store_tokens, equal_until(store_tokens, PAGE))
    for cache, heads in zip(ours.caches, held, strict=True):
        cache.heads = heads
    extra = -(-int(capacity.max()) // packed.page_tokens)
    alone = {
        (layer, head): Sequence("reference", policy, dtype, 1, 1, extra, first, softcap, numbers)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }
    # A seed that makes no two runs equally good: the closest differ by 2e-4.
    generator, equal = torch.Generator().manual_seed(4), equal_until(store_tokens, PAGE)
    boundary, evictions = 0, 0
    # A page of float32 holds twice as much of a store.
    for page in range(max(PAGES_READ + 6 * (numbers.itemsize - 2), first + 3)):
        keys, values = torch.randn(2, LAYERS, PAGE, HEADS, D, generator=generator).to(numbers)
        queries = torch.randn(LAYERS, PAGE, 2 * HEADS, D, generator=generator).to(numbers)
        at, after = page * PAGE, boundary + 1 if boundary else max(store_pages + 1, first)
        retires = page >= max(store_pages + 1, first)
        gone = boundary * PAGE
        uniform = min(store_tokens, gone)
        # One query per row now and then, as in decode: the kernels then leave their weights to be observed.
        asked = queries[:, :1] if page % 3 == 2 else queries
        at += PAGE - 1 if page % 3 == 2 else 0
        for layer in range(LAYERS):
            ours.write(layer, page * PAGE, keys[layer], values[layer])
            output, lse = ours.attend(layer, asked[layer], at, boundary, uniform, gone - uniform)
            if retires:
                ours.retire(layer, boundary, after, uniform, gone - uniform, store_tokens)
            for head in range(HEADS):
                one, mine = alone[layer, head], int(capacity[layer, head])
                stored = gone if gone <= equal else min(mine, gone)
                evictions += gone - stored > 0
                one.write(0, page * PAGE, keys[layer, :, head : head + 1], values[layer, :, head : head + 1])
                group = slice(2 * head, 2 * head + 2)
                want, want_lse = one.attend(0, asked[layer][:, group], at, boundary, stored, gone - stored)
                torch.testing.assert_close(output[:, group], want, atol=1e-2, rtol=2e-2)
                torch.testing.assert_close(lse[:, group], want_lse, atol=5e-3 if INTERPRETED or units else 2e-3, rtol=0)
                if retires:
                    one.retire(
                        0, boundary, after, stored, gone - stored, store_tokens if after * PAGE <= equal else mine
                    )
        # Every layer of a step has run: what the next step finds.
        boundary = after if retires else 0
        for (layer, head), one in alone.items() if retires else ():
            gone = boundary * PAGE
            tiles = (gone if gone <= equal else min(int(capacity[layer, head]), gone)) // 8
            raw, size = one.caches[0].packed, packed.layout.tile_bytes
            pages = [*range(1, 1 + one.store_pages), *one.extra]
            own = [(pages[n // raw.page_tiles], n % raw.page_tiles * size) for n in range(tiles)]
            want = [raw.raw[page, 0, at : at + size] for page, at in own]
            got = tiles_held(ours.caches[layer], head, tiles)
            same = sum(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert same == tiles, f"layer {layer}, head {head}, page {page}: {tiles - same} of {tiles} tiles differ"
    assert evictions > (5 if INTERPRETED else 50)
    gone, page = boundary * PAGE, torch.tensor([[MOMENT_PAGE]])
    uniform = torch.tensor([min(store_tokens, gone)])
    for (layer, head), one in alone.items():
        cache, lost = ours.caches[layer], float(max(0, gone - int(capacity[layer, head])))
        got = cache.read_moments(page, cache.evicted(uniform, gone - uniform.float()))
        want = one.caches[0].read_moments(page, torch.tensor([lost]))
        assert got.count[0, head] == lost
        torch.testing.assert_close(got.mean_key[:, head], want.mean_key[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(got.mean_value[:, head], want.mean_value[:, 0], atol=1e-5, rtol=0)
