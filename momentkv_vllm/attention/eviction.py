"""What the CPU and the CUDA backend share: the bounded spec, the batch of rows below their budget, and the layer's hot path.

Each class goes before vLLM's own in the bases; without --kv-eviction every method behaves as vLLM's.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from momentkv_vllm.attention.metadata import EvictionMetadata, StockRows
from momentkv_vllm.attention.monitor import Monitor
from momentkv_vllm.attention.sinks import add_sinks
from momentkv_vllm.block_manager.spec import MomentKVSpec, record_layout
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import KernelFamily, select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import CacheShape
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, fresh_pages
from momentkv_vllm.model_layers import hides_tokens


@dataclass
class StockPart:
    """Rows below their budget, as a batch of their own for vLLM's kernel; `tokens` indexes the flat token list."""

    tokens: torch.Tensor
    metadata: Any


class EvictingBackend:
    """For an AttentionBackend."""

    loading: ClassVar[VllmConfig | None] = None
    """Config of the model whose layers were built last in this process. vLLM calls `customize_spec` after loading, with
    no config in reach (vllm/v1/worker/gpu_model_runner.py, get_kv_cache_spec)."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Called for every layer's spec by both model runners; full attention layers get the bounded one, layers with a
        window hold no more than that anyway. A layer that asks what one token takes (a page of one) is told."""
        loading = EvictingBackend.loading
        config = EvictionConfig.from_vllm(loading) if loading else EvictionConfig()
        full = _full_spec(spec, loading) if config.active and spec.block_size > 1 else None
        return spec if full is None else MomentKVSpec.of(full, config, loading, layers_of_all_stages(loading))


def _full_spec(spec: AttentionSpec, vllm_config: VllmConfig) -> FullAttentionSpec | None:
    """The spec of a layer that attends to all tokens of a sequence, as one with a window that hides none does; else None."""
    if type(spec) is FullAttentionSpec:
        return spec
    if type(spec) is not SlidingWindowSpec or hides_tokens(spec.sliding_window, vllm_config.model_config):
        return None
    common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
    # Layers with windows choose pages of their own (vllm/model_executor/layers/attention/attention.py).
    return FullAttentionSpec(**common | {"block_size": vllm_config.cache_config.block_size})


WINDOW_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Specs of layers that vLLM serves, in our pool: they attend to a part of a sequence and hold no more than that."""


def require_bounded_spec(spec: AttentionSpec, config: EvictionConfig, layer_names: list[str]) -> None:
    """Raises RuntimeError if layers would be served without eviction."""
    if not isinstance(spec, MomentKVSpec):
        raise RuntimeError(
            f"--kv-eviction {config.policy} is on, but layers {layer_names[:2]}... have the KV cache spec "
            f"{type(spec).__name__} instead of MomentKVSpec: they would be served without eviction"
        )


def evicting_layers(vllm_config: VllmConfig) -> int:
    """How many layers of the loaded model evict."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    specs = (layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer.impl, EvictingImpl))
    return sum(_full_spec(spec, vllm_config) is not None for spec in specs)


def leave_to_vllm(vllm_config: VllmConfig, config: EvictionConfig, layer_names: list[str]) -> None:
    """Layers with one of WINDOW_SPECS do not evict; the part of a layer that is ours does not see all kinds of windows.
    Raises ValueError for a model none of whose layers evicts."""
    for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
        layer.impl.config = None
    require_evicting_layers(vllm_config, config)


def layers_of_all_stages(vllm_config: VllmConfig) -> int:
    """How many layers evict over all pipeline stages, of which a process loads one; with several, every layer of the model
    does (validate.py)."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return vllm_config.model_config.get_total_num_hidden_layers()
    return evicting_layers(vllm_config)


def require_evicting_layers(vllm_config: VllmConfig, config: EvictionConfig) -> None:
    """Raises ValueError for a model none of whose layers evicts."""
    if not evicting_layers(vllm_config):
        raise ValueError(
            f"--kv-eviction {config.policy}: every layer of this model has a sliding window and holds no more than that; "
            f"there is nothing to evict; serve without --kv-eviction"
        )


def stock_part(
    rows: StockRows,
    query_start_cpu: torch.Tensor,
    common: CommonAttentionMetadata,
    build: Callable[[int, CommonAttentionMetadata], Any],
) -> StockPart:
    """The rows `rows` of a step as a batch of their own, its metadata made by vLLM's `build`.

    Args:
        rows: on the step's device.
        query_start_cpu: its `query_start` on the host.
    """
    batch = replace(
        common,
        query_start_loc=rows.query_start,
        query_start_loc_cpu=query_start_cpu,
        seq_lens=common.seq_lens[rows.index],
        num_reqs=len(rows.index),
        num_actual_tokens=len(rows.tokens),
        max_query_len=int(query_start_cpu.diff().max()),
        block_table_tensor=common.block_table_tensor[rows.index],
        slot_mapping=common.slot_mapping[rows.tokens],
    )
    return StockPart(rows.tokens, build(0, batch))


class EvictingImpl:
    """For an AttentionImpl: one layer."""

    device_type: ClassVar[str]
    view: ClassVar[Callable[..., CacheView]]

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs
    ) -> None:
        vllm_config = EvictingBackend.loading = get_current_vllm_config()
        config = EvictionConfig.from_vllm(vllm_config)
        if config.active and not hides_tokens(sliding_window, vllm_config.model_config):
            sliding_window = None
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs)
        slides = self.sliding_window not in (-1, (-1, -1))
        self.shares_pool = config.active
        self.config = config if config.active and not slides else None
        if config.active:
            _refuse_layer(self, slides)
        if self.config is None:
            return
        self.policy = config.policy_class()
        self.record_layout = record_layout(config, self.head_size)
        shape = CacheShape(head_size, vllm_config.cache_config.block_size, vllm_config.model_config.dtype)
        self.kernels: KernelFamily = select(config.kernels, self.device_type, shape)
        self.observed: Observed | None = None

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        if self.config is None:
            if self.shares_pool:
                _zero_fresh_pages(kv_cache, slot_mapping)
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        cache = self.view(kv_cache, self.record_layout)
        self.kernels.write(cache, key, value, slot_mapping, self._observed_in(cache))

    def fused_output_quant_supported(self, quant_key) -> bool:
        """Ours write no quantized output: `forward` ignores `output_scale` where rows are evicted."""
        return self.config is None and super().fused_output_quant_supported(quant_key)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """As vLLM's, see there for shapes. The hot path of eviction."""
        plan: EvictionMetadata | None = getattr(attn_metadata, "eviction", None)
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
        cache, monitor = self.view(kv_cache, self.record_layout), getattr(attn_metadata, "monitor", None)
        for work in plan.rounds:
            sampling = monitor if monitor and monitor.due(work) else None
            for attend in work.attends:
                self._attend(cache, query, output, attend, sampling)
            for retire in work.retires:
                with monitor.timed() if monitor else nullcontext():
                    self.kernels.consolidate(
                        cache, self._observed_in(cache), retire, self.policy, self.config.sink_tokens, self.scale
                    )
        return output

    def _attend(
        self, cache: CacheView, query: torch.Tensor, output: torch.Tensor, work: AttendWork, sampling: Monitor | None
    ) -> None:
        observed, corrected = work.observe_from is not None, self.config.correction != "off"
        needs_lse = observed or sampling or self.sinks is not None
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if needs_lse else None
        target = torch.empty_like(query) if work.observe_only else output
        self.kernels.attend(cache, query, target, lse, work, self.scale, corrected)
        if sampling:
            sampling.sample(cache, query, target, lse, work, self.scale, corrected)
        if self.sinks is not None:
            add_sinks(target, lse, work, self.sinks)
        if observed:
            self._observe(cache, query, lse, work)

    def _observe(self, cache: CacheView, query: torch.Tensor, lse: torch.Tensor, work: AttendWork) -> None:
        observed = self._observed_in(cache)
        if observed is None:
            # A captured memset would run at every replay; observation begins by clearing what it will read.
            capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
            observed = self.observed = Observed.of(cache, self.policy.observes.what, cleared=not capturing)
        self.kernels.observe(cache, observed, query, lse, work, self.scale)

    def _observed_in(self, cache: CacheView) -> Observed | None:
        """What was observed in this cache, None before the first time.

        vLLM's KV cache may be another one than before: CUDA graphs are first captured on a small one to measure them, then
        thrown away (vllm/v1/worker/gpu_model_runner.py, profile_cudagraph_memory). While a cache stays, so does the address.
        """
        if self.observed is not None and not self.observed.fits(cache):
            self.observed = None
        return self.observed


def _zero_fresh_pages(kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Zero pages whose first slot is about to be written, in a layer that does not evict but shares the pool with layers that
    do: such a page may have been a moment page there (kernels/base.py, `write`)."""
    kv_cache[fresh_pages(slot_mapping, kv_cache.shape[2])] = 0


def _refuse_layer(impl: EvictingImpl, slides: bool) -> None:
    """Layer features that eviction does not model. Raises ValueError; the model cannot be loaded then."""
    # Clearing pages and adding sinks wait for the device, which a captured step cannot.
    on_gpu = impl.device_type == "cuda"
    reasons = {
        "sliding-window attention on a GPU": slides and on_gpu,
        "ALiBi": impl.alibi_slopes is not None,
        "logits soft-capping": bool(impl.logits_soft_cap),
        "attention sinks on a GPU": impl.sinks is not None and on_gpu,
        f"attention type {impl.attn_type!r}": impl.attn_type != "decoder",
        f"a KV cache of {impl.kv_cache_dtype}, not of the model's dtype": is_quantized_kv_cache(impl.kv_cache_dtype),
        "KV sharing between layers": impl.kv_sharing_target_layer_name is not None,
    }
    for feature, present in reasons.items():
        if present:
            raise ValueError(f"--kv-eviction does not support models with {feature}; serve without --kv-eviction")
