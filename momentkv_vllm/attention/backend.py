"""The CPU attention backend: vLLM's own below the budget, store -> attend -> observe -> consolidate above it.

Registered in place of vLLM's CPU_ATTN (its platform always returns that one); without --kv-eviction every method behaves
as the class it derives from (vllm/v1/attention/backends/cpu_attn.py, vLLM 0.32.0).
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from momentkv_vllm.attention.metadata import EvictionMetadata, WorkBuilder
from momentkv_vllm.attention.monitor import Monitor
from momentkv_vllm.attention.self_check import check_cache_layout
from momentkv_vllm.block_manager.spec import MomentKVSpec, record_layout
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import dispatch
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork
from momentkv_vllm.policies import POLICIES

logger = init_logger(__name__)


@dataclass
class StockPart:
    """Rows below their budget, as a batch of their own for vLLM's kernel; `tokens` indexes the flat token list."""

    tokens: torch.Tensor
    metadata: CPUAttentionMetadata


@dataclass
class MomentKVMetadata(CPUAttentionMetadata):
    """vLLM's metadata plus ours; `eviction` None means the whole step is stock. Only the first rank has a monitor."""

    eviction: EvictionMetadata | None = None
    stock_part: StockPart | None = None
    monitor: Monitor | None = None


class MomentKVBackend(CPUAttentionBackend):
    """vLLM's seam: names the builder, the implementation and the KV cache spec."""

    loading: ClassVar[VllmConfig | None] = None
    """Config of the model whose layers were built last in this process. vLLM calls `customize_spec` after loading, with
    no config in reach (vllm/v1/worker/gpu_model_runner.py, get_kv_cache_spec)."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        if isinstance(kv_cache_spec, MomentKVSpec):
            return [MultipleOf(16)]
        return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Called for every layer's spec by both model runners; full attention layers get the bounded one."""
        config = EvictionConfig.from_vllm(cls.loading) if cls.loading else EvictionConfig()
        if not config.active or type(spec) is not FullAttentionSpec:
            return spec
        return MomentKVSpec.of(spec, config, cls.loading)

    @staticmethod
    def get_impl_cls() -> type["MomentKVImpl"]:
        return MomentKVImpl

    @staticmethod
    def get_builder_cls() -> type["MomentKVMetadataBuilder"]:
        return MomentKVMetadataBuilder


class MomentKVMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds vLLM's metadata, and our work lists when a row of the batch is past its budget."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.work: WorkBuilder | None = None
        self.monitor: Monitor | None = None
        config = EvictionConfig.from_vllm(vllm_config)
        if not config.active:
            return
        if not isinstance(kv_cache_spec, MomentKVSpec):
            raise RuntimeError(
                f"--kv-eviction {config.policy} is on, but layers {layer_names[:2]}... have the KV cache spec "
                f"{type(kv_cache_spec).__name__} instead of MomentKVSpec: they would be served without eviction"
            )
        if self.isa == "amx":
            # Its cache layout is packed for tiles; the AVX-512 path of the same kernels reads the plain one.
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        check_cache_layout(self.isa, kv_cache_spec)
        logger.info_once(
            "--kv-eviction %s: kernels %s", config.policy, dispatch.describe(dispatch.select(config.kernels))
        )
        self.work = WorkBuilder(kv_cache_spec.schedule, config, POLICIES[config.policy])
        if get_tensor_model_parallel_rank() == 0:
            self.monitor = Monitor(kv_cache_spec)
        if config.prefill == "full":
            # Makes the runner hand prompt lengths to builders (CommonAttentionMetadata.rswa_prefix_lens), the only field
            # that carries them. Nothing else on a CPU worker reads this attribute of this process's config copy.
            vllm_config.model_config.model_arch_config.rswa_window = vllm_config.model_config.max_model_len

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> CPUAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.work is None:
            return stock
        plan = self._plan(common_attn_metadata)
        if not plan.rounds:
            return stock
        part = self._stock_part(plan.stock_rows, common_attn_metadata) if plan.stock_rows else None
        return MomentKVMetadata(**vars(stock), eviction=plan, stock_part=part, monitor=self.monitor)

    def _plan(self, common: CommonAttentionMetadata) -> EvictionMetadata:
        n = common.num_reqs
        prompts = [0] * n if common.rswa_prefix_lens is None else common.rswa_prefix_lens[:n].tolist()
        return self.work.build(
            common.query_start_loc_cpu[: n + 1].tolist(),
            common.seq_lens[:n].tolist(),
            prompts,
            common.block_table_tensor[:n],
        )

    def _stock_part(self, rows: list[int], common: CommonAttentionMetadata) -> StockPart:
        starts = common.query_start_loc_cpu.tolist()
        index = torch.tensor(rows)
        lens = [starts[r + 1] - starts[r] for r in rows]
        tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
        query_start = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        batch = replace(
            common,
            query_start_loc=query_start,
            query_start_loc_cpu=query_start,
            seq_lens=common.seq_lens[index],
            num_reqs=len(rows),
            num_actual_tokens=len(tokens),
            max_query_len=max(lens),
            block_table_tensor=common.block_table_tensor[index],
            slot_mapping=common.slot_mapping[tokens],
        )
        return StockPart(tokens, super().build(0, batch))


class MomentKVImpl(CPUAttentionBackendImpl):
    """One layer."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        MomentKVBackend.loading = get_current_vllm_config()
        config = EvictionConfig.from_vllm(MomentKVBackend.loading)
        self.config = config if config.active else None
        if self.config is None:
            return
        _refuse_layer(self)
        self.policy = POLICIES[config.policy]()
        self.record = record_layout(config, self.head_size)
        self.kernels = dispatch.select(config.kernels)
        self.slot_mass: torch.Tensor | None = None

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        if self.config is None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        self.kernels.store(CacheView.of_vllm_cpu(kv_cache, self.record), key, value, slot_mapping, self.slot_mass)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """As vLLM's; see CPUAttentionBackendImpl.forward for shapes. The hot path of eviction."""
        plan = getattr(attn_metadata, "eviction", None)
        if plan is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        part = attn_metadata.stock_part
        if part is not None:
            rows = query[part.tokens]
            output[part.tokens] = super().forward(
                layer, rows, key, value, kv_cache, part.metadata, torch.empty_like(rows)
            )
        cache, monitor = CacheView.of_vllm_cpu(kv_cache, self.record), attn_metadata.monitor
        for work in plan.rounds:
            sampling = monitor if monitor and monitor.due(work) else None
            for attend in work.attends:
                self._attend(cache, query, output, attend, sampling)
            for retire in work.retires:
                with monitor.timed() if monitor else nullcontext():
                    self.kernels.consolidate(
                        cache, self.slot_mass, retire, self.policy, self.config.sink_tokens, self.scale
                    )
        return output

    def _attend(
        self, cache: CacheView, query: torch.Tensor, output: torch.Tensor, work: AttendWork, sampling: Monitor | None
    ) -> None:
        observed, corrected = work.observe_from is not None, self.config.correction != "off"
        lse = torch.empty(query.shape[:2], dtype=torch.float32) if observed or sampling else None
        target = torch.empty_like(query) if work.observe_only else output
        self.kernels.attend(cache, query, target, lse, work, self.scale, corrected)
        if sampling:
            sampling.sample(cache, query, output, lse, work, self.scale, corrected)
        if observed:
            self._observe(cache, query, lse, work)

    def _observe(self, cache: CacheView, query: torch.Tensor, lse: torch.Tensor, work: AttendWork) -> None:
        if self.slot_mass is None:
            shape = cache.keys.shape[:3]
            self.slot_mass = torch.zeros(*shape, 3) if self.policy.observes_logits else torch.zeros(shape)
        self.kernels.observe(cache, self.slot_mass, query, lse, work, self.scale)


def _refuse_layer(impl: MomentKVImpl) -> None:
    """Layer features that eviction does not model. Raises ValueError; the model cannot be loaded then."""
    reasons = {
        "sliding-window attention": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "logits soft-capping": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"attention type {impl.attn_type!r}": impl.attn_type != "decoder",
        "KV sharing between layers": impl.kv_sharing_target_layer_name is not None,
    }
    for feature, present in reasons.items():
        if present:
            raise ValueError(f"--kv-eviction does not support models with {feature}; serve without --kv-eviction")
