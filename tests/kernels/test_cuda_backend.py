"""The CUDA backend without a GPU: its builder and layers on CPU tensors, kernels in Triton's interpreter, against the CPU backend."""

import os
from types import SimpleNamespace

import pytest
import torch
from layer_sides import HEADS, PAGE, D, Side, common_of, config_of, new_tokens
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from momentkv_vllm.attention import cpu_backend
from momentkv_vllm.attention.cpu_backend import MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder
from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.attention.cuda_choice import CudaChoice
from momentkv_vllm.attention.step_plan import StepPlan
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import shared
from momentkv_vllm.kernels import select, triton
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.kernels.worklists import AttendWork, Round
from momentkv_vllm.plugin import register
from momentkv_vllm.vllm_seams import gpu

CUDA = (CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    """No process groups here."""
    monkeypatch.setattr(cpu_backend, "get_tensor_model_parallel_rank", lambda: 0)


def stock_attention(self, layer, query, key, value, kv_cache, metadata, output, *_):
    """What vLLM's Triton kernel computes; it cannot be imported here without a GPU."""
    starts = metadata.query_start_loc.long()
    queries = starts[1:] - starts[:-1]
    last = metadata.seq_lens.long() - queries
    none = torch.zeros(len(last), 0, dtype=torch.long)
    work = AttendWork(starts[:-1], queries, metadata.block_table.long(), last, none, torch.zeros(len(last)))
    cache = self.view_of(kv_cache)
    select("reference").attend(cache, query, output, None, work, self.scale, False)
    return output


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
@pytest.mark.parametrize("policy", ["momentkv", "knorm"])
def test_the_layer_answers_as_the_cpu_backend(models, monkeypatch, policy):
    """Chunks, first events, decode steps with and without events, rows below the budget beside them."""
    register()
    monkeypatch.setattr(TritonAttentionImpl, "forward", stock_attention)
    config = config_of(models(), policy=policy)
    cpu = Side(config, MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder)
    cuda = Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
    assert (cuda.builder.decode_planner is not None) == (policy == "momentkv")
    generator = torch.Generator().manual_seed(2)
    lens = [0, 0, 0]
    steps = [[40, 7, 90], [50, 1, 30], [1, 1, 1], [20, 1, 1], *[[1, 1, 1]] * 14]
    for new in steps:
        lens = [a + b for a, b in zip(lens, new)]
        tokens = new_tokens(sum(new), generator)
        want = cpu.step(common_of(lens, new), *tokens)
        output = cuda.step(common_of(lens, new), *tokens)
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-4)
    assert (
        cpu.builder.planner.schedules[0].boundary_column(lens[0]) > 0
        and cpu.builder.planner.schedules[0].boundary_column(lens[1]) == 0
    )


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
def test_the_layer_answers_as_the_cpu_backend_where_heads_have_budgets_of_their_own(models, monkeypatch):
    """Decode steps retire at their end, in one launch, by the layer's own table. A prompt, then steps of one query until heads
    lend."""
    register()
    monkeypatch.setattr(TritonAttentionImpl, "forward", stock_attention)
    options = {"budget_tokens": 64, "store_dtype": "int8", "correction": "zeroth", "head_budgets": "measured"}
    config = config_of(models(), key_rounding="nearest", prefill="chunked", **options)
    sides = Side(config, MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder), Side(config, *CUDA)
    schedule = sides[0].builder.planner.schedules[0]
    for side in sides:
        cache = side.impl.view_of(side.cache)
        capacity = shared(torch.tensor([[0.05, 1.0]]), schedule.store_tokens, 8, longest=512)
        given = capacity, schedule.store_tokens, schedule.equal_tokens
        side.impl.heads = budgets_in([cache], [side.impl.observing(cache)], *given)
    generator, lens = torch.Generator().manual_seed(2), [0, 0]
    grown = 0
    for new in ([120, 30], *[[1, 1]] * 34):
        lens = [a + b for a, b in zip(lens, new)]
        tokens = new_tokens(sum(new), generator)
        want, got = (side.step(common_of(lens, new), *tokens) for side in sides)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        column = schedule.boundary_column(lens[0])
        grown += column > schedule.boundary_column(lens[0] - new[0]) and column * PAGE > schedule.store_tokens
    assert grown, "an event of a decode step fills lent tiles"


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
def test_the_layer_answers_as_the_cpu_backend_while_prompts_are_read_by_their_own_grain(models, monkeypatch):
    """Coarse events, the catch-up at a prompt's end, and that of a prompt whose last token comes alone, by the device's plan."""
    register()
    monkeypatch.setattr(TritonAttentionImpl, "forward", stock_attention)
    config = config_of(models(), prefill_retire_tokens=48)
    cpu = Side(config, MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder)
    cuda = Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
    assert cuda.builder.decode_planner is not None and config.model_config.rswa_window == 512
    generator, lens, prompts = torch.Generator().manual_seed(2), [0, 0, 0], [176, 90, 150]
    schedule, shapes = cpu.builder.planner.schedules[0], set()
    for new in ([100, 50, 149], [75, 40, 1], *[[1, 1, 1]] * 9):
        lens = [a + b for a, b in zip(lens, new)]
        tokens, common = new_tokens(sum(new), generator), common_of(lens, new, prompts=prompts)
        want = cpu.step(common, *tokens)
        torch.testing.assert_close(cuda.step(common, *tokens), want, rtol=1e-4, atol=1e-4)
        decode = max(new) == 1
        grown = [
            schedule.boundary_column(b, p) - schedule.boundary_column(b - n, p) for b, n, p in zip(lens, new, prompts)
        ]
        shapes |= {(decode, columns) for columns in grown if columns}
    assert schedule.retire_pages == 1 and {(True, 2), (False, 3)} <= shapes, "a catch-up in a step of single queries"


def test_prompt_lengths_reach_both_planners(models, monkeypatch):
    """Also where graphs are captured and there are no prompts."""
    register()
    monkeypatch.setattr(triton.Triton, "objections", lambda self: [])
    cuda = Side(config_of(models(), prefill_retire_tokens=48), *CUDA)
    given = []
    monkeypatch.setattr(
        cuda.builder.decode_planner, "update", lambda *args: given.append(args[-1]) or StepPlan([], [Round([], [None])])
    )
    monkeypatch.setattr(
        cuda.builder.planner, "build", lambda starts, lens, prompts, table: given.append(prompts) or StepPlan([0], [])
    )
    cuda.builder.build(0, common_of([170, 40], [1, 1], prompts=[100, 40]))
    cuda.builder.build(0, common_of([170, 40], [30, 1], prompts=[200, 40]))
    cuda.builder.build_for_cudagraph_capture(common_of([1], [1]))
    assert given[0].tolist() == [100, 40] and given[1] == [200, 40] and given[2] is None
    plain = Side(config_of(models()), *CUDA)
    assert plain.builder.vllm_config.model_config.rswa_window is None


def test_vllms_own_mask_stays_away_from_prompts(models):
    """The second builder of a process finds the setting of the first."""
    register()
    config = config_of(models(), prefill_retire_tokens=48)
    for _ in range(2):
        builder = Side(config, *CUDA).builder
        stock = builder.build(0, common_of([30], [30], prompts=[30]))
        assert stock.rswa_prefix_lens is None and stock.rswa_window is None


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
def test_decode_steps_reuse_their_buffers(models):
    """What a captured graph holds on to: every list at its address, of its shape, whatever retires."""
    register()
    cuda = Side(config_of(models()), CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
    captured = lists_of(cuda.builder.build_for_cudagraph_capture(common_of([1, 1, 1], [1, 1, 1])))
    schedule = cuda.builder.planner.schedules[0]
    due = [schedule.first_event_tokens, schedule.first_event_tokens + schedule.retire_tokens, 5]
    replayed = lists_of(cuda.builder.build(0, common_of(due, [1, 1, 1])))
    for before, now in zip(captured, replayed, strict=True):
        for name, x in vars(before).items():
            if isinstance(x, torch.Tensor):
                assert x.data_ptr() == getattr(now, name).data_ptr() and x.shape == getattr(now, name).shape, name
    assert (replayed[1].retiring_pages >= 0).any(1).tolist() == [True, True, False]
    assert replayed[1].due[:3].tolist() == [2, 0, 1]
    assert captured[0].most_queries == 1


def lists_of(metadata):
    """What attends, and what retires at the end of the step."""
    (round_,) = metadata.eviction.rounds
    return [*round_.attends, metadata.at_end.work]


@pytest.mark.parametrize(
    ("settings", "captured"), [({}, True), ({"policy": "h2o"}, False), ({"kernels": "reference"}, False)]
)
def test_graphs_only_where_nothing_needs_the_host(models, monkeypatch, settings, captured):
    register()
    monkeypatch.setattr(triton.Triton, "objections", lambda self: [])
    config = config_of(models(), **settings)
    spec = Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder).builder.kv_cache_spec
    support = CudaMomentKVMetadataBuilder.get_cudagraph_support(config, spec)
    want = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if captured else AttentionCGSupport.NEVER
    assert support is want


def test_the_backend_is_vllms_custom_one():
    register()
    assert AttentionBackendEnum.CUSTOM.get_class() is CudaChoice
    assert AttentionBackendEnum[CudaMomentKVBackend.get_name()] is AttentionBackendEnum.CUSTOM


@pytest.mark.parametrize(
    ("change", "word"),
    [({}, None), ({"kv_cache_dtype": "fp8"}, "fp8"), ({"block_size": 24}, "block_size"),
     ({"has_sliding_window": True}, "sliding-window layers on a GPU"), ({"has_sink": True}, "attention sinks on a GPU")],
)  # fmt: skip
def test_layers_that_it_cannot_serve(change, word):
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16)
    layer = layer._replace(**change)
    reasons = CudaMomentKVBackend.validate_configuration(device_capability=DeviceCapability(9, 0), **layer._asdict())
    assert (reasons == []) if word is None else any(word in r for r in reasons)


def asked(**text):
    """As much of a vLLM configuration as these refusals read."""
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**text), attention_chunk_size=None, max_model_len=512, is_hybrid=False,
        model_arch_config=SimpleNamespace(per_layer_overrides=None),
    )  # fmt: skip
    return SimpleNamespace(speculative_config=None, model_config=model)


@pytest.mark.parametrize("insists", [False, True])
def test_a_gpu_is_refused_unless_the_user_insists(monkeypatch, caplog, insists):
    monkeypatch.setenv(gpu.ALLOW_UNTESTED_GPU.name, "1" if insists else "0")
    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda=lambda: True)
    config = EvictionConfig("momentkv")
    found = gpu.gpu_rows(platform, asked(), config)
    refused = [f"{row.feature}; {row.way_out}" for row in found if row.present]
    assert bool(refused) is not insists
    assert insists or "not been run on a GPU yet" in refused[0] and gpu.ALLOW_UNTESTED_GPU.name in refused[0]
    other = SimpleNamespace(device_type="xpu", is_cpu=lambda: False, is_cuda=lambda: False)
    assert any(row.present for row in gpu.gpu_rows(other, asked(), config))


@pytest.mark.parametrize("prefill", ["auto", "full"])
def test_prompts_that_are_exact_are_refused_on_a_gpu(monkeypatch, prefill):
    """Their events retire any number of pages, and lists have a width."""
    rows = refused_on_a_gpu(monkeypatch, EvictionConfig("momentkv", prefill=prefill, prefill_retire_tokens=256))
    (row,) = rows
    assert prefill in row.feature and "prefill chunked" in row.way_out


def test_layers_with_a_window_are_refused_on_a_gpu(monkeypatch):
    """GPT-OSS, Gemma, OLMo 3; not a window as long as any sequence."""
    (row,) = refused_on_a_gpu(monkeypatch, EvictionConfig("momentkv"), sliding_window=128)
    assert "sliding-window layers on a GPU" in row.feature
    assert not refused_on_a_gpu(monkeypatch, EvictionConfig("momentkv"), sliding_window=512)


def refused_on_a_gpu(monkeypatch, config, **text):
    monkeypatch.setenv(gpu.ALLOW_UNTESTED_GPU.name, "1")
    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda=lambda: True)
    return [row for row in gpu.gpu_rows(platform, asked(**text), config) if row.present]


def test_several_budgets_are_refused_on_a_gpu(monkeypatch):
    (refused,) = refused_on_a_gpu(monkeypatch, EvictionConfig("momentkv", budgets="256,off"))
    assert "several budgets (256, off) on a GPU" in refused.feature and "--kv-budget" in refused.way_out


def test_layers_that_share_a_cache_are_refused_on_a_gpu(monkeypatch):
    (refused,) = refused_on_a_gpu(monkeypatch, EvictionConfig("momentkv"), num_kv_shared_layers=20)
    assert "KV sharing between layers on a GPU" in refused.feature


def test_the_layout_is_checked():
    strided = torch.zeros(3, PAGE, HEADS, 2 * D).transpose(1, 2)
    with pytest.raises(ValueError, match="LBHNC"):
        CacheView.of_vllm_gpu(strided, None)
    allowed = CudaMomentKVBackend.supported_kv_cache_layouts()
    assert allowed and all(layout.name.endswith("NC") for layout in allowed)
