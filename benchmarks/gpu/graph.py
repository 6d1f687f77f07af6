"""A decode layer over whole retiring periods: graph replay against eager, a family's life and its stores against the
reference's."""

from dataclasses import replace

import torch
from shape import SINKS

from momentkv_vllm.attention.step_plan_on_device import DecodePlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.layer_table import LayerTable
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import LayersOf, RetireWork, mapped
from momentkv_vllm.key_rounding import feedback_of
from momentkv_vllm.packed_store import TILE_TOKENS, PackedLayout
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.page_schedule import PageSchedule, build_schedule
from momentkv_vllm.policies import find

POLICY, PAGE = find("momentkv"), 16
STORES = {"model": (1, "first", 2**-6), "int8": (1, "zeroth", 2**-5), "int4": (8, "zeroth", 2**-4)}
"""By store: run_tokens, the correction, and by how much of its length an output may differ: where the scores of two candidates
agree to rounding, another one stays."""


def laid_out(
    store: str, budget: int, d: int, grain: int | None = None
) -> tuple[EvictionConfig, PageSchedule, RecordLayout, PackedLayout | None]:
    """As StateLayout.of in kv_spec.py, which needs vLLM, for bfloat16; grain: prefill_retire_tokens."""
    run, correction, _ = STORES[store]
    config = EvictionConfig(
        policy="momentkv", budget_tokens=budget, correction=correction, store_dtype=store, run_tokens=run,
        prefill_retire_tokens=grain,
    )  # fmt: skip
    if store == "model":
        record = RecordLayout(d)
        return config, build_schedule(config, PAGE, record.pages(PAGE, 2), False), record, None
    packed, part, record = (
        PackedLayout(store, d),
        PAGE * 2 * d * 2,
        RecordLayout(d, has_covariance=False, has_centres=True),
    )
    page_tokens, start = packed.tokens_per_page(part), (part - record.num_bytes) // 64 * 64
    record = replace(record, start=start)
    behind = page_tokens - min(page_tokens, start // packed.tile_bytes * TILE_TOKENS)
    return config, build_schedule(config, PAGE, 0, False, page_tokens, behind), record, packed


def dealt(rows: int, columns: int, store: int, own: int, generator: torch.Generator) -> torch.Tensor:
    """A block table [rows, columns] int32 of sequences that own `own` pages each: behind the first `store` columns, pages that
    left come again, as from vLLM's pool."""
    owned = torch.randperm(rows * own, generator=generator, device=generator.device).view(rows, own) + 1
    column = torch.arange(columns, device=generator.device)
    return owned[:, torch.where(column < store, column, store + (column - store) % (own - store))].int()


class Layer:
    """A decode layer of `rows` sequences with persistent inputs, as the engine's graph sees them.

    full: the sequences are past the point where their stores are full, which hold anything. Else they are about to evict first;
    a quantised store then has room for all.
    """

    def __init__(
        self, family, device: str, store: str, rows: int, heads: int, groups: int, d: int, budget: int,
        full: bool = False,
    ) -> None:  # fmt: skip
        self.family, self.device, self.rows, self.d = family, device, rows, d
        config, self.schedule, record, packed = laid_out(store, budget, d)
        self.planner = DecodePlanner(self.schedule, config, POLICY, rows, device)
        retire, first = self.schedule.retire_tokens, self.schedule.first_event_tokens
        past = max(0, self.schedule.store_tokens - first) // retire * retire + 2 * retire
        self.begin, own = first + (past if full else 0), 2 * self.schedule.budget_pages
        columns = self.begin // PAGE + 2 * self.schedule.budget_pages
        generator = torch.Generator(device).manual_seed(3)
        self.table = dealt(rows, columns, self.schedule.store_pages, own, generator)
        shape = (rows * own + 1, heads, PAGE, 2 * d)
        kv = torch.randn(shape, generator=generator, device=device).bfloat16()
        self.cache = CacheView.of_vllm_gpu(kv, record, packed)
        self.mass = Observed.of(self.cache, "mass")
        self.query = torch.zeros(rows, heads * groups, d, dtype=torch.bfloat16, device=device)
        self.key, self.value = (torch.zeros(rows, heads, d, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.output, self.slots = torch.zeros_like(self.query), torch.zeros(rows, dtype=torch.int64, device=device)
        self.query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.policy, self.scale = POLICY(), d**-0.5

    def prepare(self, step: int) -> None:
        """Inputs of a step; row i is i tokens ahead, so that rows retire in different steps."""
        ahead = torch.arange(self.rows, device=self.device)
        lens = self.begin - 4 + step + ahead
        generator = torch.Generator(self.device).manual_seed(step)
        for x in (self.query, self.key, self.value):
            x.copy_(torch.randn(x.shape, generator=generator, device=self.device))
        position = lens - 1
        page = self.table.long().gather(1, (position // PAGE).unsqueeze(1)).squeeze(1)
        self.slots.copy_(page * PAGE + position % PAGE)
        self.work = self.planner.update(lens.int(), self.query_start, self.table).rounds[0]

    def forward(self) -> None:
        self.attend()
        self.retire(self.work.retires[0])

    def attend(self) -> None:
        self.family.write(self.cache, self.key, self.value, self.slots, self.mass)
        given = self.query, self.output, self.work.attends[0], self.scale, True
        self.family.attend_and_observe(self.cache, self.mass, *given)

    def retire(self, work: RetireWork) -> None:
        self.family.consolidate(self.cache, self.mass, work, self.policy, SINKS, self.scale)

    def retired(self) -> int:
        return int((self.work.retires[0].retiring_pages >= 0).sum())


class ReferenceLayer(Layer):
    """The reference does not know rows that retire nothing."""

    def retire(self, work: RetireWork) -> None:
        due = (work.retiring_pages >= 0).any(1)
        if due.any():
            super().retire(mapped(replace(work, due=None), lambda _, x: x[due]))


def together_of(layers: list[Layer], device: str) -> LayersOf:
    caches, observed = [layer.cache for layer in layers], [layer.mass for layer in layers]
    return LayersOf(caches, observed, LayerTable(device).of(caches, observed))


def forward(layers: list[Layer], together: LayersOf) -> None:
    """As attention/cuda_backend.py: every layer attends, then all retire."""
    for layer in layers:
        layer.attend()
    retire_all(layers, together)


def retire_all(layers: list[Layer], together: LayersOf) -> None:
    first = layers[0]
    first.family.consolidate_layers(together, first.work.retires[0], first.policy, SINKS, first.scale)


def feedback_for(cache: CacheView) -> torch.Tensor:
    """Of errors in keys, as if queries were of a random moment that says more of some directions than of others."""
    heads, d = cache.keys.shape[1], cache.keys.shape[3]
    made = torch.Generator().manual_seed(11)
    queries = torch.randn(heads, 4 * d, d, generator=made) * 1.05 ** -torch.arange(d)
    queries = queries @ torch.linalg.qr(torch.randn(d, d, generator=made))[0]
    return feedback_of(queries.transpose(1, 2) @ queries, cache.packed_layout.width).to(cache.kv.device)


def sizes_of(tiny: bool) -> tuple[int, ...]:
    """rows, heads, groups, d, budget"""
    return (2, 1, 2, 32, 128) if tiny else (32, 8, 4, 128, 1024)


def replay(family, device: str, tiny: bool, store: str = "model") -> dict:
    """Steps over two retiring periods, eager and (on a GPU) replayed: outputs and caches must be the same bits."""
    eager, replayed = (Layer(family, device, store, *sizes_of(tiny), full=store != "model") for _ in range(2))
    replayed.prepare(0)
    kv = replayed.cache.kv.clone()
    replayed.forward()  # compiles
    graph = None
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed.forward()
    replayed.cache.kv.copy_(kv)
    replayed.mass.data.zero_()
    steps = 6 if tiny else 2 * eager.schedule.retire_tokens + 40
    retired = 0
    for step in range(steps):
        for layer, go in ((eager, eager.forward), (replayed, graph.replay if graph else replayed.forward)):
            layer.prepare(step)
            go()
        retired += eager.retired()
        assert torch.equal(eager.output, replayed.output), f"step {step}: replay differs from eager"
    same = torch.equal(eager.cache.kv.view(torch.uint8), replayed.cache.kv.view(torch.uint8))
    assert same and retired > 0, "replay left another cache, or nothing retired"
    return {"steps": steps, "retired_pages": retired, "equal": True, "captured": graph is not None}


def life(family, device: str, tiny: bool, store: str) -> dict:
    """A family beside the reference, step by step across events that evict: outputs agree."""
    given = device, store, *sizes_of(tiny), store != "model"
    ours, want = Layer(family, *given), ReferenceLayer(select("reference"), *given)
    steps = 6 if tiny else ours.schedule.retire_tokens + 40
    worst, retired, allowed = 0.0, 0, STORES[store][2]
    for step in range(steps):
        for layer in (ours, want):
            layer.prepare(step)
            layer.forward()
        retired += ours.retired()
        error = ((ours.output.float() - want.output.float()).norm() / want.output.float().norm()).item()
        assert error <= allowed, f"{family.name}, {store}, step {step}: outputs differ by {error:.2e} > {allowed:.2e}"
        worst = max(worst, error)
    assert retired > 0, "nothing retired"
    return {"store": store, "steps": steps, "retired_pages": retired, "worst_relative_difference": worst}


def stores(family, device: str, tiny: bool, store: str, fed_back: bool) -> dict:
    """Events of stores that have room for all: where nobody competes, every byte is the reference's, but for records without a
    token."""
    given = device, store, *sizes_of(tiny)
    ours, want = Layer(family, *given), ReferenceLayer(select("reference"), *given)
    if fed_back:
        ours.cache.feedback = want.cache.feedback = feedback_for(ours.cache)
    steps, retired = 6 if tiny else ours.schedule.retire_tokens + 8, 0
    records = ours.table[:, ours.schedule.store_pages - 1].long()
    for step in range(steps):
        for layer in (ours, want):
            layer.prepare(step)
            layer.family.write(layer.cache, layer.key, layer.value, layer.slots, layer.mass)
            layer.retire(layer.work.retires[0])
        retired += ours.retired()
        differs = ours.cache.raw != want.cache.raw
        differs[records, :, ours.cache.record_layout.start :] = False
        assert not differs.any(), f"{family.name}, {store}, {fed_back=}, step {step}: {int(differs.sum())} bytes differ"
    assert retired > 0, "nothing retired"
    return {"store": store, "fed_back": fed_back, "steps": steps, "retired_pages": retired}
