"""The C++ kernels of csrc/cpu; base.py documents the operations."""

from math import prod

import torch

from momentkv_vllm.fp8 import KINDS
from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import CacheShape, Limits
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork

try:
    from momentkv_vllm import _cpu  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.momentkv_cpu
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""

_ops = torch.ops.momentkv_cpu

MAX_LEFT = 1 << 25
"""Weights that attend leaves to observe where rows have several queries: 128 MiB. Of more, observe computes them again: the same
bits, after AMX the same numbers to rounding."""


class Cpu(KernelFamily):
    """Reads vLLM's cache where it lies; AMX, AVX-512, AVX2 or plain vectors at run time. csrc/cpu checks the limits too."""

    name = "cpu"
    devices = ("cpu",)
    limits = Limits(
        range(16, 513, 16), page_step=16, dtypes=(torch.float32, torch.bfloat16, torch.float16, *set(KINDS.values()))
    )
    native_scores = ("key_direction",)
    feeds_back = True
    own_budgets = True

    def objections(self) -> list[str]:
        if _why_missing:
            return [
                f"the extension momentkv_vllm._cpu is not built for this torch ({_why_missing}): reinstall with a C++ compiler"
            ]
        try:
            self.isa()
        except RuntimeError as error:
            return [str(error)]
        return []

    def attends_prompts(self, shape: CacheShape) -> bool:
        # vLLM's way with AMX wants a layout of its own. As `fits_units` in csrc/cpu/attend_units.h.
        return self.isa() == "amx" and shape.dtype is torch.bfloat16 and shape.head_size % 32 == 0

    def label(self) -> str:
        return f"{self.name} ({self.isa()})"

    def isa(self) -> str:
        """Instruction set in use: amx, avx512vnni, avx512, avx2 or generic. Raises RuntimeError if MOMENTKV_CPU_ISA asks for one
        that is missing."""
        return _ops.isa()

    def _write(self, cache: CacheView, key, value, slots, mass) -> None:
        _ops.write(*cache.cache_arguments, key, value, slots, mass)

    def attend(self, cache: CacheView, query, output, lse, work: AttendWork, scale: float, corrected: bool) -> None:
        self._attend(cache, query, output, lse, work, scale, corrected, None)

    def attend_and_observe(self, cache: CacheView, observed, query, output, work: AttendWork, scale: float, corrected):
        if observed.mass is None:
            return super().attend_and_observe(cache, observed, query, output, work, scale, corrected)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self._attend(cache, query, output, lse, work, scale, corrected, observed.mass)

    def _attend(self, cache: CacheView, query, output, lse, work: AttendWork, scale: float, corrected, mass) -> None:
        if work.observe_from is not None:
            self._make_room(cache, query, work)
        given = *cache.cache_arguments, query, output, lse, *work.arguments(), scale, cache.softcap, corrected
        store = work.stored, work.store_pages, cache.packed_arguments, *cache.head_arguments
        _ops.attend(*given, *cache.record_arguments, *store, work.weights, mass)

    def _make_room(self, cache: CacheView, query, work: AttendWork) -> None:
        """Room for the weights of observed queries: observing is then one pass over what attention has computed, not another one
        over the keys. Rows that are not observed leave their part alone: it costs addresses and no memory."""
        store_slots = 0 if work.stored is None else cache.store_slots(work.store_pages)
        # A weight per slot, then what they are relative to for every eight.
        slots, heads = store_slots + work.pages.shape[1] * cache.page_size, cache.keys.shape[1]
        shape = len(work.pages), heads, work.most_observed * query.shape[1] // heads, slots + slots // 8
        if prod(shape) == 0 or (prod(shape) > MAX_LEFT and work.query_bound() > 1):
            work.weights = None
        elif work.weights is None or work.weights.shape != shape:
            work.weights = query.new_empty(shape, dtype=torch.float32)

    def _observe(self, cache: CacheView, mass, query, lse, work: AttendWork, scale: float) -> None:
        store = work.stored, work.store_pages, cache.packed_arguments, *cache.head_arguments
        _ops.observe(
            *cache.cache_arguments, mass, query, lse, *work.arguments(), scale, cache.softcap, *store, work.weights
        )

    def read_store(self, cache: CacheView, pages):
        return _ops.read_store(cache.kv, pages, cache.packed_arguments)

    def _consolidate(self, cache: CacheView, mass, work: RetireWork, score, sink_tokens: int, attention_weight) -> None:
        given = *cache.cache_arguments, *work.arguments(), score, mass, sink_tokens, attention_weight
        store = work.stored, work.run_tokens, work.store_tokens, cache.packed_arguments, *cache.head_arguments
        _ops.consolidate(*given, *cache.record_arguments, *store, cache.feedback)
