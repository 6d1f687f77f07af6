"""The CPU attention backend: vLLM's own below the budget, write -> attend -> observe -> consolidate above it.
Prompts below it are ours, too, where we are faster (KernelFamily.attends_prompts).

Registered in place of vLLM's CPU_ATTN (its platform always returns that one); without --kv-eviction every method behaves
as the class it derives from (vllm/v1/attention/backends/cpu_attn.py, vLLM 0.32.0).
"""

from dataclasses import dataclass

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.attention.monitor import Monitor
from momentkv_vllm.attention.prompt_lengths import ask_for_prompt_lengths, prompt_lengths
from momentkv_vllm.attention.self_check import check_cache_layout
from momentkv_vllm.attention.sharing import SharingPlanner
from momentkv_vllm.attention.spec_hook import (
    WINDOW_SPECS,
    EvictingBackend,
    StepRows,
    leave_to_vllm,
    require_bounded_spec,
    shares_caches,
)
from momentkv_vllm.attention.step_plan import StepPlan, StepPlanner
from momentkv_vllm.attention.stock_rows import StockPart, StockRows, stock_part
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.fp8 import kv_numbers
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kv_spec import MomentKVSpec

logger = init_logger(f"vllm.{__name__}")


@dataclass
class MomentKVMetadata(CPUAttentionMetadata):
    """vLLM's metadata plus ours; `eviction` None: the whole step is stock. Only the first tensor-parallel rank has a monitor."""

    eviction: StepPlan | None = None
    stock_part: StockPart | None = None
    monitor: Monitor | None = None


class MomentKVBackend(EvictingBackend, CPUAttentionBackend):
    """vLLM's seam: names the builder, the implementation and the KV cache spec."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: AttentionSpec | None = None) -> list[int | MultipleOf]:
        if isinstance(kv_cache_spec, MomentKVSpec):
            # Named as a number, vLLM splits its blocks into kernel blocks of that size.
            return [kv_cache_spec.schedule.page_size] if kv_cache_spec.splits_blocks else [MultipleOf(16)]
        return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)

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
        self.planner: StepPlanner | None = None
        self.monitor: Monitor | None = None
        config = EvictionConfig.from_vllm(vllm_config)
        if not config.active:
            return
        if isinstance(kv_cache_spec, WINDOW_SPECS):
            leave_to_vllm(vllm_config, config, layer_names)
            return
        require_bounded_spec(kv_cache_spec, config, layer_names)
        if self.isa == "amx":
            # Its cache layout is packed for tiles; the AVX-512 path of the same kernels reads the plain one.
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        numbers = kv_numbers(vllm_config)
        check_cache_layout(self.isa, kv_cache_spec, numbers)
        shape = kv_cache_spec.layout.cache_shape(numbers)
        kernels = select(config.kernels, shape=shape)
        logger.info_once("--kv-eviction %s: kernels %s", config.policy, kernels.label())
        planner = SharingPlanner if shares_caches(vllm_config) else StepPlanner
        prompts = kernels.attends_prompts(shape)
        self.planner = planner(kv_cache_spec.schedules, config, config.policy_class, prompts=prompts)
        if get_tensor_model_parallel_rank() == 0:
            self.monitor = Monitor(kv_cache_spec)
        ask_for_prompt_lengths(self, kv_cache_spec.schedules, vllm_config)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> CPUAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.planner is None:
            return stock
        n = common_attn_metadata.num_reqs
        EvictingBackend.step_rows = StepRows(
            common_attn_metadata.seq_lens[:n].tolist(), prompt_lengths(common_attn_metadata, n)
        )
        return self._with_plan(stock, common_attn_metadata, self.monitor)

    def build_for_drafting(self, common_attn_metadata, draft_index) -> CPUAttentionMetadata:
        """Of a drafter's pass over the step that was just computed: its layers evict where the model's did, and take no notice of
        tokens that are not committed."""
        stock = super().build(0, common_attn_metadata, True)
        return stock if self.planner is None else self._with_plan(stock, common_attn_metadata, None)

    def _with_plan(
        self, stock: CPUAttentionMetadata, common: CommonAttentionMetadata, monitor: Monitor | None
    ) -> CPUAttentionMetadata:
        step = self._step(common, EvictingBackend.step_rows)
        if not step.rounds:
            return stock
        part = None
        if step.stock_rows:
            rows = StockRows.of(step.stock_rows, common.query_start_loc_cpu.tolist())
            part = stock_part(rows, rows.query_start, common, super().build)
        return MomentKVMetadata(**vars(stock), eviction=step, stock_part=part, monitor=monitor)

    def _step(self, common: CommonAttentionMetadata, rows: StepRows) -> StepPlan:
        n = common.num_reqs
        return self.planner.build(
            common.query_start_loc_cpu[: n + 1].tolist(),
            common.seq_lens[:n].tolist(),
            rows.prompts,
            common.block_table_tensor[:n],
            EvictingBackend.row_classes,
            rows.committed,
        )


class MomentKVImpl(EvictingImpl, CPUAttentionBackendImpl):
    """One layer."""

    device_type = "cpu"
    view = staticmethod(CacheView.of_vllm_cpu)
