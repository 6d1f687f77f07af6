"""The CUDA attention backend: vLLM's own attention below the budget, our kernels above it. Not run on a GPU yet.

What is ours of a backend of vLLM's, whichever that is, and the one that stands on vLLM's Triton attention
(vllm/v1/attention/backends/triton_attn.py, vLLM 0.32.0); cuda_flash.py has the other one, cuda_choice.py chooses. Two kinds of
steps:

* every request has one query: work lists made on the device in persistent buffers (step_plan_on_device.py), all requests in one
  launch of each kernel. Nothing waits for the device; a FULL CUDA graph replays it, also where pages retire.
* any other step: work lists made on the host from lengths that it knows, page numbers looked up on the device. Runs between
  the pieces of piecewise graphs. Rows below their budget are vLLM's own kernel's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from momentkv_vllm.attention.at_end import RetireAtEnd
from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.attention.prompt_lengths import ask_for_prompt_lengths, on_device, prompt_lengths
from momentkv_vllm.attention.spec_hook import EvictingBackend, require_bounded_spec
from momentkv_vllm.attention.step_plan import MAX_SLOTS_PER_WORK, StepPlan, StepPlanner
from momentkv_vllm.attention.step_plan_on_device import DecodePlanner
from momentkv_vllm.attention.stock_rows import StockPart, StockRows, stock_part
from momentkv_vllm.attention.upload import upload_step
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import KernelFamily, select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.layer_table import LayerTable
from momentkv_vllm.kv_spec import MomentKVSpec

logger = init_logger(f"vllm.{__name__}")

ANY_SLOTS = 1 << 62
"""Retained slots of one work list: kernels read them in place, and every further list is a launch more."""

REFUSED = {
    "has_sliding_window": "sliding-window layers",
    "has_sink": "attention sinks",
    "use_mm_prefix": "images read in both directions",
    "use_kv_connector": "KV connectors",
    "use_dcp": "decode context parallelism",
    "use_pcp": "prefill context parallelism",
}
"""What vLLM asks of a layer's backend, in words."""


@dataclass
class CudaEviction:
    """What metadata has beside vLLM's; `eviction` None means the whole step is stock."""

    eviction: StepPlan | None = None
    stock_part: StockPart | None = None
    at_end: RetireAtEnd | None = None


class CudaEvictingBackend(EvictingBackend):
    """For an AttentionBackend; stands before vLLM's class in the bases. Names the KV cache spec and the layouts that our kernels
    read.

    impl, builder: that stand on the same class of vLLM's.
    """

    impl: ClassVar[type["CudaEvictingImpl"]]
    builder: ClassVar[type["CudaEvictingBuilder"]]
    supports_kv_cache_update_bypass = False
    """Of vLLM 0.33: whether a model may write its keys and values itself, past ours."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type["CudaEvictingImpl"]:
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type["CudaEvictingBuilder"]:
        return cls.builder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A record runs through a head's part of a page, which must be one piece.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LHBNC, KVCacheLayout.BHLNC)

    @classmethod
    def validate_configuration(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype, *args, **kwargs) -> list[str]:
        """vLLM's reasons, and ours, why this backend cannot serve a layer."""
        reasons = super().validate_configuration(head_size, dtype, kv_cache_dtype, *args, **kwargs)
        if kv_cache_dtype not in (None, "auto", "float16", "bfloat16", "float32"):
            reasons.append(f"--kv-eviction does not support kv_cache_dtype {kv_cache_dtype}; use auto")
        refused = (what for key, what in REFUSED.items() if kwargs.get(key))
        return reasons + [f"--kv-eviction does not support {what} on a GPU; serve without it" for what in refused]


class CudaEvictingBuilder:
    """For an AttentionMetadataBuilder, likewise. Builds vLLM's metadata and our work lists.

    metadata: vLLM's, with CudaEviction's fields.
    """

    metadata: ClassVar[type]
    supports_update_block_table = False
    """Our lists hold pages, not only vLLM's metadata."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """FULL graphs for decode steps, where nothing needs the host: scores that no kernel computes do (kernels/triton.py)."""
        config = EvictionConfig.from_vllm(vllm_config)
        if not config.active:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if _plans_on_device(config, _family(config, kv_cache_spec)):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False  # vLLM's constructors set it
        self.planner: StepPlanner | None = None
        self.decode_planner: DecodePlanner | None = None
        self.layers, self.layer_table = max(1, len(layer_names)), LayerTable(device)
        self.places = torch.empty(0, 0, dtype=torch.long)
        config = EvictionConfig.from_vllm(vllm_config)
        if not config.active:
            return
        require_bounded_spec(kv_cache_spec, config, layer_names)
        policy, schedule = config.policy_class, kv_cache_spec.schedule
        kernels = _family(config, kv_cache_spec)
        logger.info_once("--kv-eviction %s: kernels %s", config.policy, kernels.label())
        gathers = kernels.name == "reference"
        most_slots = MAX_SLOTS_PER_WORK if gathers else ANY_SLOTS
        self.planner = StepPlanner([schedule], config, policy, most_slots, schedule.most_retired_pages)
        ask_for_prompt_lengths(self, kv_cache_spec.schedules, vllm_config)
        if _plans_on_device(config, kernels):
            sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
            rows = max(vllm_config.scheduler_config.max_num_seqs, *sizes, 1)
            self.decode_planner = DecodePlanner(schedule, config, policy, rows, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Any:
        common: CommonAttentionMetadata = common_attn_metadata
        if self.planner is None:
            return super().build(common_prefix_len, common, fast_build)
        if self.decode_planner is not None and common.max_query_len == 1:
            n = common.num_reqs
            prompts = on_device(common, n, self.device)
            step = self.decode_planner.update(
                common.seq_lens[:n], common.query_start_loc[: n + 1], common.block_table_tensor[:n], prompts
            )
            at_end = RetireAtEnd(step.rounds[0].retires.pop(), self.layers, self.layer_table)
            return self._with_ours(common, eviction=step, at_end=at_end)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        step, table = self._step_on_host(common, starts)
        if not step.rounds:
            return super().build(common_prefix_len, common, fast_build)
        rows = [StockRows.of(step.stock_rows, starts)] if step.stock_rows else []
        there = upload_step(step, rows, table)
        part = stock_part(there[0], rows[0].query_start, common, super().build) if rows else None
        return self._with_ours(common, eviction=step, stock_part=part)

    def _with_ours(self, common: CommonAttentionMetadata, **ours: Any) -> Any:
        """vLLM's metadata of the whole step, by which it attends nothing: its kernel is planned for `stock_part` alone."""
        return self.metadata(**vars(super().build(0, common, True)), **ours)

    def _step_on_host(self, common: CommonAttentionMetadata, starts: list[int]) -> tuple[StepPlan, torch.Tensor]:
        """(lists on the host that name places instead of pages, which only the device knows; the pages by place)"""
        # Exact without speculative decoding, which a GPU does not get (vllm_seams/refusals.py).
        lens = common.seq_lens_cpu_upper_bound if common.seq_lens_cpu_upper_bound is not None else common.seq_lens
        # Padding requests come last and have no query.
        n = sum(b > a for a, b in zip(starts, starts[1:], strict=False))
        table = common.block_table_tensor[:n]
        step = self.planner.build(starts[: n + 1], lens[:n].tolist(), prompt_lengths(common, n), self._places_of(table))
        return step, F.pad(table.flatten().long(), (1, 0))

    def _places_of(self, table: torch.Tensor) -> torch.Tensor:
        """Where each entry of a block table [rows, columns] lies in it; place 0 is the null page, which pads. Kept: a context of
        128K tokens has 8,192 columns a row, of which a step reads a few."""
        rows, columns = table.shape
        if len(self.places) < rows or self.places.shape[1] != columns:
            self.places = torch.arange(1, table.numel() + 1).view(table.shape)
        return self.places[:rows]


class CudaEvictingImpl(EvictingImpl):
    """For an AttentionImpl, likewise. One layer."""

    device_type = "cuda"
    view = staticmethod(CacheView.of_vllm_gpu)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """As vLLM's."""
        scales = output_scale, output_block_scale
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        at_end: RetireAtEnd | None = getattr(attn_metadata, "at_end", None)
        if at_end is not None:
            at_end.attended(self, self.view_of(kv_cache))
        return result


def _family(config: EvictionConfig, spec: MomentKVSpec) -> KernelFamily:
    return select(config.kernels, CudaEvictingImpl.device_type, spec.layout.cache_shape(spec.dtype))


def _plans_on_device(config: EvictionConfig, kernels: KernelFamily) -> bool:
    return config.policy_class.native in kernels.native_scores and config.prefill == "chunked"


@dataclass
class CudaMomentKVMetadata(CudaEviction, TritonAttentionMetadata):
    """On vLLM's Triton attention, which serves what FlashAttention does not."""


class CudaMomentKVMetadataBuilder(CudaEvictingBuilder, TritonAttentionMetadataBuilder):
    """Likewise."""

    metadata = CudaMomentKVMetadata


class CudaMomentKVImpl(CudaEvictingImpl, TritonAttentionImpl):
    """Likewise."""


class CudaMomentKVBackend(CudaEvictingBackend, TritonAttentionBackend):
    """Likewise."""

    impl, builder = CudaMomentKVImpl, CudaMomentKVMetadataBuilder
