"""Events of several layers in one launch leave what they leave layer by layer, bit for bit."""

import math
import os
from dataclasses import replace

import pytest
import torch

from momentkv_vllm.head_budgets import equal_until, shared
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.layer_table import LayerTable
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.kernels.worklists import LayersOf, RetireWork
from momentkv_vllm.key_rounding import feedback_of
from momentkv_vllm.packed_store import PackedLayout
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
LAYERS, ROWS, HEADS, D, PAGE, STORE = 2, 3, 1, 32, 16, 2
DUE = [0, 2]


def cache_of(
    layer: int, packed: PackedLayout | None, record: RecordLayout, heads: int = HEADS
) -> tuple[CacheView, Observed]:
    """Of random tokens; page 0 is nobody's."""
    generator = torch.Generator().manual_seed(layer)
    kv = torch.randn(1 + ROWS * 7, heads, PAGE, 2 * D, generator=generator).bfloat16()
    kv[0] = math.nan
    cache = CacheView.of_vllm_gpu(kv, record, packed)
    mass = Observed.of(cache, "mass")
    mass.data.copy_(torch.rand(mass.data.shape, generator=generator))
    return cache, mass


def event(packed: PackedLayout | None, capacity: int, stored: int, evicted: int) -> RetireWork:
    """Row 1 retires nothing, row 2 a page less than row 0; pages of a row: two of the store, three, two of the record."""
    pages = torch.arange(1, 1 + ROWS * 7).view(ROWS, 7)
    retiring = pages[:, 2:5].clone()
    retiring[1], retiring[2, 2] = -1, -1
    return RetireWork(
        store_pages=pages[:, :STORE].contiguous(), retiring_pages=retiring, moment_pages=pages[:, 5:].contiguous(),
        num_evicted=torch.full((ROWS,), float(evicted)), run_tokens=8 if packed else 1,
        stored=torch.full((ROWS,), stored) if packed else None, store_tokens=capacity if packed else 0,
        due=torch.tensor([len(DUE), *DUE, -7]),
    )  # fmt: skip


def feedbacks(layers: int) -> list[torch.Tensor]:
    """Every layer's own."""
    queries = torch.randn(layers, HEADS, 4, D, generator=torch.Generator().manual_seed(7))
    return [feedback_of(q.transpose(1, 2) @ q, D) for q in queries]


@pytest.mark.parametrize("policy", ["momentkv", "keydiff"])
@pytest.mark.parametrize("store", ["model", "int4", "int4_fed_back"])
def test_layers_together_are_layers_one_by_one(monkeypatch, policy, store):
    """A program's rows take turns here."""
    monkeypatch.setattr("momentkv_vllm.triton_kernels.consolidate_layers.ROWS_AT_ONCE", 1)
    packed = PackedLayout("int4", D) if store != "model" else None
    record = RecordLayout(D, has_covariance=packed is None, has_centres=packed is not None)
    policy, family = find(policy)(), select("triton", "cpu")
    one_by_one, together = ([cache_of(i, packed, record) for i in range(LAYERS)] for _ in range(2))
    for layers in (one_by_one, together) if store == "int4_fed_back" else ():
        for (cache, _), feedback in zip(layers, feedbacks(LAYERS), strict=True):
            cache.feedback = feedback
    capacity = 56
    # The first event, and one over a full store and a record.
    for stored, evicted in ((0, 0), (capacity, 24)):
        work = event(packed, capacity, stored, evicted)
        for cache, mass in one_by_one:
            family.consolidate(cache, mass, work, policy, 4, D**-0.5)
        caches, observed = map(list, zip(*together, strict=True))
        offsets = LayerTable("cpu").of(caches, observed)
        family.consolidate_layers(LayersOf(caches, observed, offsets), work, policy, 4, D**-0.5)
        for (want, want_mass), (got, got_mass) in zip(one_by_one, together, strict=True):
            assert torch.equal(want.raw, got.raw) and torch.equal(want_mass.data, got_mass.data)
    before = cache_of(0, packed, record)[0].raw
    changed = [bool((together[0][0].raw[p] != before[p]).any()) for p in work.store_pages[:, 0].tolist()]
    assert changed == [row in DUE for row in range(ROWS)]


def with_heads_of_their_own(pairs: list[tuple[CacheView, Observed]], store_tokens: int) -> list[CacheView]:
    """Caches of layers whose heads share their stores of so many tokens; each of them lends, or is lent, some tiles."""
    caches, observed = map(list, zip(*pairs, strict=True))
    capacity = shared(torch.tensor([[0.02, 0.5], [0.05, 1.0]]), store_tokens, 8, longest=10_000)
    assert capacity[0, 1] > store_tokens and capacity[1, 1] > store_tokens and capacity[1].sum() > 2 * store_tokens
    held = budgets_in(caches, observed, capacity, store_tokens, equal_until(store_tokens, 3 * PAGE))
    return [replace(cache, heads=heads) for cache, heads in zip(caches, held, strict=True)]


@pytest.mark.parametrize(("store_tokens", "lends_at_once"), [(112, False), (56, True)])
def test_heads_of_their_own_together_are_layers_one_by_one(monkeypatch, store_tokens, lends_at_once):
    """In one launch all programs run the other way round: no tile is read in one and written in another. At first five pages go,
    more or less than an equal share of the store."""
    from momentkv_vllm.triton_kernels import consolidate_layers
    from triton.runtime.interpreter import interpreter_builder

    moved, in_order, move = [], interpreter_builder.set_grid_idx, consolidate_layers.move_lent
    monkeypatch.setattr(consolidate_layers, "move_lent", lambda *given: (moved.append(1), move(*given)))
    packed, record = PackedLayout("int4", D), RecordLayout(D, has_covariance=False, has_centres=True)
    policy, family = find("momentkv")(), select("triton", "cpu")
    one_by_one, together = ([cache_of(i, packed, record, heads=2) for i in range(LAYERS)] for _ in range(2))
    alone, caches = (with_heads_of_their_own(pairs, store_tokens) for pairs in (one_by_one, together))
    observed = [mass for _, mass in together]
    offsets, gone = LayerTable("cpu").of(caches, observed), torch.zeros(ROWS, dtype=torch.int64)
    for number in range(3 - lends_at_once):
        stored = gone.clamp(max=store_tokens)
        work = replace(event(packed, store_tokens, 0, 0), stored=stored, num_evicted=(gone - stored).float())
        for cache, (_, mass) in zip(alone, one_by_one, strict=True):
            family.consolidate(cache, mass, work, policy, 4, D**-0.5)
        with monkeypatch.context() as turned:
            turned.setattr(interpreter_builder, "set_grid_idx", lambda *at: in_order(*from_the_end(at)))
            family.consolidate_layers(LayersOf(caches, observed, offsets), work, policy, 4, D**-0.5)
        for want, got, (_, want_mass), got_mass in zip(alone, caches, one_by_one, observed, strict=True):
            assert torch.equal(want.raw, got.raw) and torch.equal(want_mass.data, got_mass.data), number
        gone += PAGE * ((work.retiring_pages >= 0).sum(1) + (STORE if number == 0 else 0))
    assert bool(moved) == lends_at_once
    assert (gone[DUE] > store_tokens).all(), "tiles were lent"


def from_the_end(at: tuple[int, int, int]) -> list[int]:
    from triton.runtime.interpreter import interpreter_builder

    return [n - 1 - i for n, i in zip(interpreter_builder.grid_dim, at, strict=True)]


def test_a_layer_table_is_made_anew_where_layers_lie_elsewhere():
    table, record = LayerTable("cpu"), RecordLayout(D)
    pairs = [cache_of(i, None, record) for i in range(3)]
    caches, observed = map(list, zip(*pairs, strict=True))
    first = table.of(caches[:2], observed[:2])
    assert table.of(caches[:2], observed[:2]) is first
    by = caches[2].kv.data_ptr() - caches[0].kv.data_ptr()
    assert first[0].tolist() == [0] * 5 and int(first[1, 0]) == caches[1].kv.data_ptr() - caches[0].kv.data_ptr()
    assert table.of(caches[::2], [None, None])[1].tolist() == [by, 0, 0, 0, 0]
    for cache, feedback in zip(caches, feedbacks(3), strict=True):
        cache.feedback = feedback
    assert int(table.of(caches, observed)[2, 4]) == caches[2].feedback.data_ptr() - caches[0].feedback.data_ptr()
