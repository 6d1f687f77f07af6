"""One layer that evicts: store the new tokens, attend, observe, consolidate. `EvictingImpl.forward` is the hot path.

What runs when is decided once per step for all layers (step_plan.py); what runs is a kernel family (kernels/reference.py is its
specification).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from momentkv_vllm.attention.monitor import Attended, Monitor, apart
from momentkv_vllm.attention.sharing import SharedCache
from momentkv_vllm.attention.sinks import add_sinks
from momentkv_vllm.attention.spec_hook import EvictingBackend
from momentkv_vllm.attention.step_plan import StepPlan
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.fp8 import KINDS, is_fp8, kv_numbers, numbers_of
from momentkv_vllm.head_budgets import HeadBudgets
from momentkv_vllm.kernels import KernelFamily, select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, Round, Rounds, fresh_pages
from momentkv_vllm.kv_spec import StateLayout, page_tokens
from momentkv_vllm.model_layers import hides_tokens, keeps_states
from momentkv_vllm.refuse import Unsupported, refuse_first


class EvictingImpl:
    """For an AttentionImpl; stands before vLLM's class in the bases. With eviction off, every method calls vLLM's."""

    device_type: ClassVar[str]
    view: ClassVar[Callable[..., CacheView]]

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs
    ) -> None:
        vllm_config = EvictingBackend.serving(get_current_vllm_config())
        config = EvictionConfig.from_vllm(vllm_config)
        if config.active and not hides_tokens(sliding_window, vllm_config.model_config):
            sliding_window = None
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, *args, **kwargs)
        slides = self.sliding_window not in (-1, (-1, -1))
        self.shares_pool = config.active
        self.config = config if config.active and not slides else None
        if config.active:
            _refuse_layer(self, slides, vllm_config)
        if self.config is None:
            return
        self.policy = config.policy_class()
        model, self.numbers = vllm_config.model_config, kv_numbers(vllm_config)
        page_size = page_tokens(config, vllm_config.cache_config.block_size, keeps_states(model), self.numbers)
        self.layout = StateLayout.of(config, page_size, head_size, self.numbers)
        self.kernels: KernelFamily = select(
            config.kernels, self.device_type, self.layout.cache_shape(self.numbers, self.logits_soft_cap)
        )
        self.keeps_fp8, self.scales = is_fp8(self.numbers), (1.0, 1.0)
        self.observed: Observed | None = None
        self.heads: Sequence[HeadBudgets | None] = ()
        self.feedback: torch.Tensor | None = None
        layers, target = vllm_config.compilation_config.static_forward_context, self.kv_sharing_target_layer_name
        self.shared = SharedCache(self, layers[target].impl if target else None)

    @property
    def evicts(self) -> bool:
        return self.config is not None

    def fused_output_quant_supported(self, quant_key) -> bool:
        """Ours write no quantized output: `forward` ignores `output_scale` where rows are evicted."""
        return self.config is None and super().fused_output_quant_supported(quant_key)

    def view_of(self, kv_cache: torch.Tensor) -> CacheView:
        """The layer's cache as kernels see it."""
        # Only the cache itself knows how many tokens vLLM has put on a page (MomentKVSpec.__post_init__).
        page_size = kv_cache.shape[2]
        if self.layout.schedule.page_size != page_size:
            self.layout = StateLayout.of(self.config, page_size, self.head_size, self.numbers)
        # vLLM's tensors of fp8 are of bytes.
        numbers = kv_cache.view(self.numbers) if self.keeps_fp8 else kv_cache
        cache = self.view(numbers, self.layout.record, self.layout.packed, self.logits_soft_cap)
        cache.feedback = self.shared.target.feedback
        if self.keeps_fp8:  # those of the layer that wrote
            cache.key_scale, cache.value_scale = self.shared.target.scales
        return cache

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        if self.config is None:
            if self.shares_pool:
                _zero_fresh_pages(kv_cache, slot_mapping)
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.keeps_fp8:
            self.scales = layer._k_scale_float, layer._v_scale_float
        cache = self.view_of(kv_cache)
        self.kernels.write(cache, key, value, slot_mapping, self._observed_in(cache))

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """As vLLM's, see there for shapes. The hot path of eviction."""
        step: StepPlan | None = getattr(attn_metadata, "eviction", None)
        if step is None:
            given = layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            return super().forward(*given)
        if self.shared.only_reads:
            output.zero_()
        part = attn_metadata.stock_part
        if part is not None:
            rows = query[part.tokens]
            output[part.tokens] = super().forward(
                layer, rows, key, value, kv_cache, part.metadata, torch.empty_like(rows)
            )
        cache, monitor = self.view_of(kv_cache), getattr(attn_metadata, "monitor", None)
        # By budget class, where its heads do not all hold as much.
        of_class = {n: replace(cache, heads=h) for n, h in enumerate(self.shared.target.heads if step.rounds else ())}
        for rounds, sampling in apart(self.shared.rounds(step), monitor, each=self.sinks is not None):
            work = Rounds(rounds, lambda n: of_class.get(n, cache), self.config.correction)
            if sampling or self.sinks is not None:
                for attend in work.attends:
                    self._attend(work, query, output, attend, sampling)
                work = replace(work, rounds=[Round(retires=work.retires)])
            observed = self.shared.target._observed_in(cache)
            if observed is None and work.observes:
                observed = self.observing(cache)
            seconds = self.kernels.run(work, observed, query, output, self.policy, self.config.sink_tokens, self.scale)
            if monitor:
                monitor.consolidated(seconds)
        return output

    def _attend(
        self, work: Rounds, query: torch.Tensor, output: torch.Tensor, attend: AttendWork, sampling: Monitor | None
    ) -> None:
        """With what is looked at on the way, or added to it."""
        cache, given = work.attended(attend.budget_class), (attend, self.scale, work.corrected)
        target = torch.empty_like(query) if attend.observe_only else output
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self.kernels.attend(cache, query, target, lse, *given)
        if sampling:
            sampling.sample(Attended(cache, query, target, lse, *given))
        if self.sinks is not None:
            add_sinks(target, lse, attend, self.sinks)
        if attend.observe_from is not None:
            self._observe(cache, query, lse, attend)

    def _observe(self, cache: CacheView, query: torch.Tensor, lse: torch.Tensor, attend: AttendWork) -> None:
        self.kernels.observe(cache, self.observing(cache), query, lse, attend, self.scale)

    def observing(self, cache: CacheView) -> Observed:
        """What is observed in this cache, from now on if it was not."""
        if self._observed_in(cache) is None:
            # A captured memset would run at every replay; observation begins by clearing what it will read.
            capturing = cache.kv.is_cuda and torch.cuda.is_current_stream_capturing()
            self.observed = Observed.of(cache, self.policy.observes.what, cleared=not capturing)
        return self.observed

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


def _refuse_layer(impl: EvictingImpl, slides: bool, vllm_config: VllmConfig) -> None:
    """Layer features that eviction does not model. Raises ValueError; the model cannot be loaded then."""
    # Clearing pages and adding sinks wait for the device, which a captured step cannot; its events are those of all layers at
    # once (at_end.py), after the last layer with a cache.
    on_gpu, numbers = impl.device_type == "cuda", kv_numbers(vllm_config)
    kind, model_dtype = impl.kv_cache_dtype, vllm_config.model_config.dtype
    unknown = is_quantized_kv_cache(kind) and kind not in KINDS
    rows = [
        Unsupported("sliding-window attention on a GPU", slides and on_gpu),
        Unsupported("ALiBi", impl.alibi_slopes is not None),
        Unsupported("attention sinks on a GPU", impl.sinks is not None and on_gpu),
        Unsupported(f"attention type {impl.attn_type!r}", impl.attn_type != "decoder"),
        Unsupported(
            f"a KV cache of {kind} where {str(numbers).removeprefix('torch.')} was expected",
            unknown or numbers_of(kind, model_dtype) is not numbers,
        ),
        Unsupported("KV sharing between layers on a GPU", impl.kv_sharing_target_layer_name is not None and on_gpu),
    ]
    refuse_first(rows, what="models with ")
