"""What a step on a GPU must not do, seen without one: wait for copies, launch kernels that find nothing to do."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layer_sides import COLUMNS, HEADS, LAYER, PAGE, TABLE, D, Side, common_of, config_of, new_cache, new_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

from momentkv_vllm.attention import upload
from momentkv_vllm.attention.cpu_backend import MomentKVImpl
from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.attention.step_plan import MAX_SLOTS_PER_WORK, StepPlan
from momentkv_vllm.kernels import triton
from momentkv_vllm.kernels.worklists import LayersOf
from momentkv_vllm.plugin import register


class Copies(TorchDispatchMode):
    """Counts copies from the host to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device.type == "cpu" != result.device.type
        return result


def mixed_step():
    """One row below the budget, one in a chunk across several events, one in decode."""
    return common_of([30, 200, 150], [30, 170, 1])


def side_of(models, **options):
    register()
    return Side(config_of(models(), **options), CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)


def test_a_mixed_step_copies_once(models, monkeypatch):
    """To `meta`, which has no data: whatever asked it for a number, and so waited for a GPU, would raise."""
    builder = side_of(models).builder
    pinned = []
    monkeypatch.setattr(upload, "_pinning", lambda device: pinned.append(device) or {})
    common = mixed_step()
    there = {
        k: getattr(common, k).to("meta") for k in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    }
    with Copies() as copies:
        metadata = builder.build(0, replace(common, **there))
    assert len(metadata.eviction.rounds) > 2 and metadata.stock_part is not None
    assert copies.count == 1 and len(pinned) == 1
    assert metadata.stock_part.tokens.device.type == metadata.eviction.rounds[0].attends[0].pages.device.type == "meta"


def test_lists_arrive_as_they_were_made(models):
    """Pages in place of places, all else bit for bit, at addresses for which Triton compiles once."""
    builder, common = side_of(models).builder, mixed_step()
    got = builder.build(0, common)
    starts = common.query_start_loc_cpu.tolist()
    want = builder.planner.build(starts, common.seq_lens.tolist(), [0] * 3, common.block_table_tensor.long())
    assert got.eviction.stock_rows == want.stock_rows == [0]
    checked = 0
    for a, b in zip(lists_of(got.eviction), lists_of(want), strict=True):
        for name, x in vars(b).items():
            y = getattr(a, name)
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y) and x.dtype == y.dtype and y.data_ptr() % upload.ALIGNMENT == 0, name
                checked += 1
            else:
                assert x == y, name
    assert checked > 50
    assert got.stock_part.tokens.tolist() == list(range(30))
    assert got.stock_part.metadata.query_start_loc.tolist() == [0, 30]
    assert got.stock_part.metadata.max_query_len == 30


def test_a_step_that_is_planned_leaves_the_last_one_as_it_was(models):
    """On the CPU lists lie where the host wrote them, as a copy still does that the device has not made."""
    builder = side_of(models).builder
    first = builder.build(0, mixed_step())
    before = [x.clone() for x in tensors_of(first)]
    second = builder.build(0, common_of([40, 130, 161], [10, 120, 11]))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), before, strict=True))
    blocks = [{x.untyped_storage().data_ptr() for x in tensors_of(step)} for step in (first, second)]
    assert not blocks[0] & blocks[1]


def test_pinned_memory_is_asked_for_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(upload, "is_pin_memory_available", lambda: True)
    assert upload._pinning(torch.device("cuda")) == {"pin_memory": True} and not upload._pinning(torch.device("cpu"))
    monkeypatch.setattr(upload, "is_pin_memory_available", lambda: False)
    assert not upload._pinning(torch.device("cuda"))


def test_decode_rows_of_a_mixed_step_are_one_list(models, monkeypatch):
    """However many slots they retain: kernels read them in place."""
    monkeypatch.setattr(triton.Triton, "objections", lambda self: [])
    builder = side_of(models, budget_tokens=192).builder
    rows = 700
    table = torch.arange(1, rows * COLUMNS + 1).view(rows, COLUMNS)
    lens, new = [220] * rows, [2, *[1] * (rows - 1)]
    step = builder.build(0, common_of(lens, new, table)).eviction
    (decode,) = [a for a in step.rounds[0].attends if not a.only_chunks]
    assert len(decode.first_token) == rows - 1 and decode.pages.numel() * PAGE > MAX_SLOTS_PER_WORK


def test_places_of_a_block_table_are_made_once(models):
    """A context of 128K tokens has 8,192 columns a row."""
    builder = side_of(models).builder
    builder.build(0, mixed_step())
    places = builder.places
    builder.build(0, common_of([31, 201, 151], [1, 1, 1])), builder.build(0, common_of([40, 210], [9, 9]))
    assert builder.places is places
    assert builder._places_of(torch.zeros(2, COLUMNS)).tolist() == places[:2].tolist()
    assert builder._places_of(torch.zeros(2, 5)).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def tensors_of(metadata) -> list[torch.Tensor]:
    lists = lists_of(metadata.eviction)
    return [x for work in lists for x in vars(work).values() if isinstance(x, torch.Tensor)]


def lists_of(step: StepPlan) -> list:
    return [work for r in step.rounds for work in (*r.attends, *r.retires)]


class Launches:
    """In place of a Triton kernel."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.seen.append(self.name)


def test_chunks_and_decode_rows_launch_their_own_kernels_only(models, monkeypatch):
    seen = []
    for module, names in ((triton._decode, ("_partials", "_reduce")), (triton._chunk, ("_chunk",))):
        for name in names:
            monkeypatch.setattr(module, name, Launches(name, seen))
    side, family = side_of(models), triton.Triton()
    cache = side.impl.view_of(new_cache(TABLE))
    query = torch.zeros(201, 2 * HEADS, D)
    kinds = set()
    for work in side.builder.build(0, mixed_step()).eviction.rounds[0].attends:
        seen.clear()
        family.attend(cache, query, query, None, work, 1.0, True)
        many = bool((work.num_queries > 1).all())
        assert seen == (["_chunk"] if many else ["_partials", "_reduce"])
        kinds.add(many)
        seen.clear()
        # Nothing is known of the rows: everything that one of them might need.
        family.attend(cache, query, query, None, replace(work, only_chunks=False, most_queries=2), 1.0, True)
        assert seen == ["_partials", "_reduce", "_chunk"]
    assert kinds == {True, False}


KERNELS = {"_decode": ("_partials", "_reduce"), "_chunk": ("_chunk",), "_write": ("_write",), "_observe": ("_observe",)}
KERNELS |= {"_consolidate": ("_consolidate", "_fill_tiles"), "_consolidate_layers": ("_consolidate_layers",)}


@pytest.fixture
def seen(monkeypatch):
    """Names of the Triton kernels that are launched."""
    from momentkv_vllm.triton_kernels import plan, score

    seen = []
    modules = [(getattr(triton, module), names) for module, names in KERNELS.items()]
    for module, names in [*modules, (plan, ("_plan", "_due")), (score, ("_sums", "_terms"))]:
        for name in names:
            monkeypatch.setattr(module, name, Launches(name, seen))
    monkeypatch.setattr(triton.Triton, "objections", lambda self: [])
    monkeypatch.setattr(triton.Triton, "runs_on", lambda self, device: True)
    register()
    return seen


EVENT = ["_chunk", "_observe", "_sums", "_terms", "_consolidate"]


@pytest.mark.parametrize(("grain", "events"), [(None, 225), (512, 15)])
def test_launches_of_a_prompt_of_8192_tokens_in_a_layer(models, seen, grain, events):
    """Five an event, and attention before the first, which nobody observes, and after the last."""
    options = {"budget_tokens": 1024, "retire_tokens": 32, "store_dtype": "model", "prefill_retire_tokens": grain}
    side, columns = side_of(models, **options), 8192 // PAGE + 2
    side.cache = torch.zeros(columns + 1, HEADS, PAGE, 2 * D)
    common = common_of([8200], [8200], torch.arange(1, columns + 1).view(1, columns), [8200])
    tokens = new_tokens(8200, torch.Generator().manual_seed(0))
    step = side.builder._step_on_host(common, [0, 8200])[0]
    metadata = SimpleNamespace(eviction=step, stock_part=None)
    side.impl.do_kv_cache_update(LAYER, *tokens[1:], side.cache, common.slot_mapping)
    side.impl.forward(LAYER, *tokens, side.cache, metadata, torch.empty_like(tokens[0]))
    assert len(list(side.builder.planner.schedules[0].events(0, 8200, 8200))) == events
    rest = Counter(seen)["_chunk"] - events  # queries of the prompt's head and end, at most 512 at a time
    assert rest <= 3
    assert Counter(seen) == {"_write": 1, "_chunk": events + rest} | dict.fromkeys(EVENT[1:], events)


def test_a_decode_step_launches_three_kernels_a_layer_and_three_a_step(models, seen):
    """Also where rows are observed or retire: a captured step is one for all. Nothing is copied but where the layers lie, once."""
    layers = 4
    config = config_of(models())
    sides = [Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder) for _ in range(layers)]
    builder = sides[0].builder
    builder.layers = layers
    tokens = new_tokens(3, torch.Generator().manual_seed(0))
    for lens in ([100, 120, 5], [95, 97, 96], [200, 31, 7]):
        seen.clear()
        with Copies() as copies:
            common = common_of(lens, [1, 1, 1])
            metadata = builder.build(0, common)
            for side in sides:
                side.impl.do_kv_cache_update(LAYER, *tokens[1:], side.cache, common.slot_mapping)
                side.impl.forward(LAYER, *tokens, side.cache, metadata, torch.empty_like(tokens[0]))
        assert seen == ["_plan", "_due", *["_write", "_partials", "_reduce"] * layers, "_consolidate_layers"]
        assert copies.count == 0


def test_layers_of_which_only_some_feed_errors_back_retire_one_by_one(models, seen):
    """A launch for all of them knows one way to round."""
    side, family = side_of(models), triton.Triton()
    work = side.builder.build(0, common_of([97, 96], [1, 1])).at_end.work
    caches = [side.impl.view_of(new_cache(TABLE)) for _ in range(2)]
    layers = LayersOf(caches, [side.impl.observing(cache) for cache in caches], torch.zeros(2, 3, dtype=torch.int64))
    for feedback, launched in (
        (None, ["_consolidate_layers"]),
        (torch.zeros(HEADS, D, D), [*EVENT[2:], "_fill_tiles", *EVENT[2:]]),
    ):
        seen.clear()
        caches[0].feedback = feedback
        family.consolidate_layers(layers, work, side.impl.policy, 4, 1.0)
        assert seen == launched


@pytest.mark.parametrize("impl", [MomentKVImpl, CudaMomentKVImpl])
def test_vllm_fuses_no_quantization_into_a_layer_that_evicts(models, impl):
    """Attention would have to write the quantized output itself (compilation/passes/fusion/attn_quant_fusion.py)."""
    register()
    plain, evicting = config_of(models()), config_of(models())
    plain.additional_config = {}
    layers = []
    for config in (plain, evicting):
        with set_current_vllm_config(config):
            layers.append(impl(4, 32, 32**-0.5, 2, None, None, "auto"))
    assert not layers[1].fused_output_quant_supported(kFp8StaticTensorSym)
    stock = super(EvictingImpl, layers[0]).fused_output_quant_supported(kFp8StaticTensorSym)
    assert layers[0].fused_output_quant_supported(kFp8StaticTensorSym) == stock == (impl is CudaMomentKVImpl)
