"""The Triton kernels of triton_kernels/; base.py documents the operations.

They address caches by strides, so they run on vLLM's CUDA layout and, in Triton's interpreter (TRITON_INTERPRET=1), on the
CPU's. Nothing here waits for the device, except for other scores than the native one and observed logits.
"""

import os

import torch

from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.worklists import AttendWork, LayersOf, RetireWork
from momentkv_vllm.policies.key_direction import attention_weight

try:
    from momentkv_vllm.triton_kernels import attend_chunk as _chunk
    from momentkv_vllm.triton_kernels import attend_decode as _decode
    from momentkv_vllm.triton_kernels import consolidate as _consolidate
    from momentkv_vllm.triton_kernels import consolidate_layers as _consolidate_layers
    from momentkv_vllm.triton_kernels import observe as _observe
    from momentkv_vllm.triton_kernels import write as _write
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""


class Triton(KernelFamily):
    """Tiles of heads larger than 256 have not been compiled: they must fit into shared memory."""

    name = "triton"
    devices = ("cuda",)
    limits = Limits(range(1, 257), page_step=16, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    native_scores = ("key_direction",)
    feeds_back = True
    own_budgets = True

    def objections(self) -> list[str]:
        if _why_missing:
            return [f"Triton cannot be imported ({_why_missing}): pip install triton"]
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return ["no CUDA GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, very slowly)"]
        return []

    def runs_on(self, device: str) -> bool:
        """Its interpreter is for tests: on a CPU the family must be named."""
        return super().runs_on(device) or os.environ.get("TRITON_INTERPRET") == "1"

    def _write(self, cache: CacheView, key, value, slots, mass) -> None:
        _write.write(cache, key, value, slots, mass)

    def attend(self, cache: CacheView, query, output, lse, work: AttendWork, scale: float, corrected: bool) -> None:
        bound = work.query_bound()
        corrected = corrected and cache.record_layout.has_means
        if not work.only_chunks:
            _decode.attend_decode(cache, query, output, lse, work, scale, corrected)
        if bound > 1:
            _chunk.attend_chunk(cache, query, output, lse, work, scale, corrected, bound)

    def attend_and_observe(
        self, cache: CacheView, observed, query, output, work: AttendWork, scale: float, corrected
    ) -> None:
        if observed.mass is None or work.most_queries != 1:
            return super().attend_and_observe(cache, observed, query, output, work, scale, corrected)
        corrected = corrected and cache.record_layout.has_means
        _decode.attend_decode(cache, query, output, None, work, scale, corrected, mass=observed.mass)

    def _observe(self, cache: CacheView, mass, query, lse, work: AttendWork, scale: float) -> None:
        _observe.observe(cache, mass, query, lse, work, scale)

    def consolidate_layers(self, layers: LayersOf, work: RetireWork, policy, sink_tokens: int, scale: float) -> None:
        some_feed_back = len({cache.feedback is None for cache in layers.caches}) > 1
        if work.due is None or policy.native not in self.native_scores or some_feed_back:
            return super().consolidate_layers(layers, work, policy, sink_tokens, scale)
        cache, first = layers.caches[0], layers.observed[0]
        mass = first.mass if first else None
        weight = attention_weight(policy, work.capacity(cache.page_size), work.run_tokens)
        _consolidate_layers.consolidate_layers(cache, mass, layers.offsets, work, cache.sinks(sink_tokens), weight)

    def _consolidate(self, cache: CacheView, mass, work: RetireWork, score, sink_tokens: int, attention_weight) -> None:
        _consolidate.consolidate(cache, mass, work, score, sink_tokens, attention_weight)
