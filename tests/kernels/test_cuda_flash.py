"""The CUDA backend on vLLM's FlashAttention, and which attention of vLLM's it takes, without a GPU (fake_flash.py)."""

import builtins
import functools

import fake_flash
import pytest
import torch
from layer_sides import Side, common_of, config_of, new_tokens
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.selector import AttentionSelectorConfig

from momentkv_vllm.attention import cpu_backend, cuda_flash
from momentkv_vllm.attention.cpu_backend import MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder
from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend
from momentkv_vllm.attention.cuda_choice import CudaChoice
from momentkv_vllm.attention.cuda_flash import (
    FlashMomentKVBackend,
    FlashMomentKVImpl,
    FlashMomentKVMetadata,
    FlashMomentKVMetadataBuilder,
)
from momentkv_vllm.attention.step_plan import StepPlan
from momentkv_vllm.kernels import triton
from momentkv_vllm.kernels.worklists import Round
from momentkv_vllm.plugin import register

FLASH = (FlashMomentKVBackend, FlashMomentKVImpl, FlashMomentKVMetadataBuilder)


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention 3 is here, and no process groups are."""
    register()
    monkeypatch.setattr(cpu_backend, "get_tensor_model_parallel_rank", lambda: 0)
    fake_flash.install(functools.partial(monkeypatch.setattr, raising=False))


@pytest.mark.parametrize("graphs", [CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY])
def test_rows_below_their_budget_are_flash_attentions(models, flash, graphs):
    """Steps that are all stock, then such rows beside others; each is planned for the rows that it serves, also in the buffer that
    graphs read."""
    config = config_of(models(), kernels="reference")
    cpu = Side(config, MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder)
    config.compilation_config.cudagraph_mode = graphs
    ours = Side(config, *FLASH)
    assert ours.builder.use_full_cuda_graph == (graphs is not CUDAGraphMode.NONE) and ours.builder.aot_schedule
    generator, lens = torch.Generator().manual_seed(2), [0, 0, 0]
    for new in ([40, 7, 50], [50, 1, 70], [1, 1, 1], [20, 1, 1], *[[1, 1, 1]] * 6):
        lens = [a + b for a, b in zip(lens, new)]
        tokens, common = new_tokens(sum(new), generator), common_of(lens, new)
        torch.testing.assert_close(ours.step(common, *tokens), cpu.step(common, *tokens), rtol=1e-4, atol=1e-4)
    assert fake_flash.served[0] == 3 and set(fake_flash.served[1:]) <= {1, 2} and len(fake_flash.served) == 10


def test_decode_steps_that_we_serve_leave_its_plan_alone(models, flash, monkeypatch):
    monkeypatch.setattr(triton.Triton, "objections", lambda self: [])
    builder = Side(config_of(models()), *FLASH).builder
    monkeypatch.setattr(builder.decode_planner, "update", lambda *_: StepPlan([], [Round([], [None])]))
    made = builder.build(0, common_of([170, 40], [1, 1]))
    assert isinstance(made, FlashMomentKVMetadata) and made.eviction and made.scheduler_metadata is None
    assert not builder.supports_update_block_table and not builder.supports_draft_decode_metadata_update


def test_stock_is_flash_attentions_own(models, flash):
    config = config_of(models(), policy="off")
    builder = Side(config, *FLASH).builder
    made = builder.build(0, common_of([170, 40], [1, 1]))
    assert type(made) is cuda_flash.FlashAttentionMetadata and made.scheduler_metadata is not None
    assert (
        builder.get_cudagraph_support(config, builder.kv_cache_spec) is FlashMomentKVMetadataBuilder._cudagraph_support
    )


def chosen(capability=(9, 0), **layer):
    """The class that vLLM would look up, or what it would say."""
    layer = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16} | layer
    asked = AttentionSelectorConfig(**layer)._asdict()
    reasons = CudaChoice.validate_configuration(device_capability=DeviceCapability(*capability), **asked)
    return reasons or CudaChoice.full_cls_name()[1]


@pytest.mark.parametrize(
    ("layer", "backend"),
    [({}, FlashMomentKVBackend), ({"head_size": 80, "dtype": torch.float16}, FlashMomentKVBackend),
     ({"capability": (8, 0)}, FlashMomentKVBackend), ({"capability": (7, 5)}, CudaMomentKVBackend),
     ({"dtype": torch.float32}, CudaMomentKVBackend), ({"head_size": 100}, CudaMomentKVBackend)],
)  # fmt: skip
def test_flash_attention_where_it_can_else_triton(flash, layer, backend):
    assert chosen(**layer) == backend.__name__


def test_triton_where_no_flash_attention_loads(flash, monkeypatch):
    monkeypatch.setattr(cuda_flash, "get_flash_attn_version", lambda **_: None)
    assert chosen() == CudaMomentKVBackend.__name__
    kept = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.endswith("cuda_flash"):
            raise ImportError("libcudart.so.13")
        return kept(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert chosen() == CudaMomentKVBackend.__name__


def test_pages_that_flash_attention_4_cannot_read_are_tritons(flash, monkeypatch):
    """Its kernel for head_size 256 on a Blackwell wants 128 tokens."""
    monkeypatch.setattr(cuda_flash, "uses_fa4_hd256_kernel", lambda head_size: head_size == 256)
    assert [chosen((10, 0), head_size=d) for d in (256, 128)] == [
        CudaMomentKVBackend.__name__,
        FlashMomentKVBackend.__name__,
    ]


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"block_size": 24}, "block_size"),
        ({"has_sink": True}, "attention sinks on a GPU"),
    ],
)
def test_what_neither_can_serve_is_refused_before_the_model_is_loaded(flash, layer, word):
    reasons = chosen(**layer)
    assert isinstance(reasons, list) and any(word in reason for reason in reasons) and len(set(reasons)) == len(reasons)


def test_no_flash_attention_here():
    assert fa_utils.get_flash_attn_version() is None
