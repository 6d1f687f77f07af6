"""The C++ kernels of csrc/cpu; base.py documents the operations."""

from math import prod

import torch

from momentkv_vllm.fp8 import KINDS
from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import CacheShape, Limits
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, Rounds
from momentkv_vllm.policies.base import Policy
from momentkv_vllm.policies.key_direction import attention_weight

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

    def run(self, work: Rounds, observed, query, output, policy: Policy, sink_tokens: int, scale: float) -> list[float]:
        if not self._in_one_call(work, observed, policy):
            return super().run(work, observed, query, output, policy, sink_tokens, scale)
        attends, retires = work.attends, work.retires
        cache, seen = work.caches(attends[0].budget_class), work.attended(attends[0].budget_class)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if work.observes else None
        order = [w for r in work.rounds for w in (*r.attends, *r.retires)]
        run_tokens, store_tokens, weight = 1, 0, 0.0
        if retires:
            run_tokens, store_tokens = retires[0].run_tokens, retires[0].store_tokens
            weight = attention_weight(policy, retires[0].capacity(cache.page_size), run_tokens)
        return _ops.rounds(
            *cache.cache_arguments, query, output, lse,
            [x for w in attends for x in (*w.arguments(), w.stored)],
            [x for w in retires for x in (*w.arguments(), w.stored)],
            [i for i, w in enumerate(order) if isinstance(w, RetireWork)],
            scale, cache.softcap, work.corrected, seen.record_layout.has_covariance, *cache.record_arguments,
            observed and observed.mass, cache.sinks(sink_tokens), weight, attends[0].store_pages, run_tokens, store_tokens,
            cache.packed_arguments, *cache.head_arguments, cache.feedback,
        )  # fmt: skip

    def _in_one_call(self, work: Rounds, observed, policy: Policy) -> bool:
        """Several rounds of one budget class that kernels compute from end to end."""
        return (
            len(work.rounds) > 1
            and len({w.budget_class for w in (*work.attends, *work.retires)}) == 1
            and not any(w.observe_only for w in work.attends)
            and (observed is None or observed.mass is not None)
            and (policy.native in self.native_scores or not any(w.evicts for w in work.retires))
        )

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
