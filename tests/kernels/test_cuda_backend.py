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
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import select, triton
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork
from momentkv_vllm.plugin import register
from momentkv_vllm.vllm_seams import gpu

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
    assert AttentionBackendEnum.CUSTOM.get_class() is CudaMomentKVBackend
    assert AttentionBackendEnum[CudaMomentKVBackend.get_name()] is AttentionBackendEnum.CUSTOM


@pytest.mark.parametrize(
    ("change", "word"),
    [({}, None), ({"kv_cache_dtype": "fp8"}, "fp8"), ({"has_sliding_window": True}, "sliding"), ({"block_size": 24}, "block_size")],
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
    model = SimpleNamespace(hf_text_config=SimpleNamespace(**text))
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


@pytest.mark.parametrize("values", [{"prefill": "auto"}, {"prefill_retire_tokens": 256}])
def test_events_that_depend_on_a_prompt_s_length_are_refused_on_a_gpu(monkeypatch, values):
    monkeypatch.setenv(gpu.ALLOW_UNTESTED_GPU.name, "1")
    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda=lambda: True)
    rows = gpu.gpu_rows(platform, asked(), EvictionConfig("momentkv", **values))
    (refused,) = [row for row in rows if row.present]
    ((key, value),) = values.items()
    assert key in refused.feature and str(value) in refused.feature and key in refused.way_out


def test_several_budgets_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv(gpu.ALLOW_UNTESTED_GPU.name, "1")
    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda=lambda: True)
    rows = gpu.gpu_rows(platform, asked(), EvictionConfig("momentkv", budgets="256,off"))
    (refused,) = [row for row in rows if row.present]
    assert "several budgets (256, off) on a GPU" in refused.feature and "--kv-budget" in refused.way_out


def test_layers_that_share_a_cache_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv(gpu.ALLOW_UNTESTED_GPU.name, "1")
    platform = SimpleNamespace(device_type="cuda", is_cpu=lambda: False, is_cuda=lambda: True)
    rows = gpu.gpu_rows(platform, asked(num_kv_shared_layers=20), EvictionConfig("momentkv"))
    (refused,) = [row for row in rows if row.present]
    assert "KV sharing between layers on a GPU" in refused.feature


def test_the_layout_is_checked():
    strided = torch.zeros(3, PAGE, HEADS, 2 * D).transpose(1, 2)
    with pytest.raises(ValueError, match="LBHNC"):
        CacheView.of_vllm_gpu(strided, None)
    allowed = CudaMomentKVBackend.supported_kv_cache_layouts()
    assert allowed and all(layout.name.endswith("NC") for layout in allowed)
