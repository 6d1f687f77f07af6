"""The C++ kernels of csrc/cpu behind the interface of reference.py, which documents every function here.

They read vLLM's cache where it lies: AVX-512, AVX2 or plain vectors, chosen at run time.
"""

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.native import given_score, mass_to_clear, mass_to_move
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Policy

try:
    from momentkv_vllm import _cpu  # noqa: F401  registers torch.ops.momentkv_cpu
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""


LIMITS = Limits(range(16, 513, 16), page_step=16, dtypes=(torch.float32, torch.bfloat16, torch.float16))
"""csrc/cpu/bindings.cpp checks the same."""


def objections() -> list[str]:
    """Why this family cannot run here."""
    if _why_missing:
        return [
            f"the extension momentkv_vllm._cpu is not built for this torch ({_why_missing}): reinstall with a C++ compiler"
        ]
    try:
        isa()
    except RuntimeError as error:
        return [str(error)]
    return []


def isa() -> str:
    """Instruction set in use: avx512, avx2 or generic. Raises RuntimeError if MOMENTKV_CPU_ISA asks for a missing one."""
    return torch.ops.momentkv_cpu.isa()


def store(
    cache: CacheView, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, slot_mass: torch.Tensor | None
) -> None:
    torch.ops.momentkv_cpu.store(cache.kv, key, value, slots, mass_to_clear(cache, slot_mass, slots))


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    correct: bool,
) -> None:
    if work.observe_from is not None and work.query_bound() == 1:
        # Observing is then one pass over what attention has computed, instead of another one over the keys. Rows that are not
        # observed leave their part alone, so it costs addresses and no memory.
        shape = (len(work.pages), query.shape[1], work.pages.shape[1] * cache.page_size)
        if work.logits is None or work.logits.shape != shape:
            work.logits = query.new_empty(shape, dtype=torch.float32)
    torch.ops.momentkv_cpu.attend(
        cache.kv,
        query,
        output,
        lse,
        work.first_token,
        work.queries,
        work.pages,
        work.last,
        work.moment_pages,
        work.count,
        work.observe_from,
        work.logits,
        scale,
        correct,
        *cache.covariance,
    )


def observe(
    cache: CacheView, slot_mass: torch.Tensor, query: torch.Tensor, lse: torch.Tensor, work: AttendWork, scale: float
) -> None:
    if slot_mass.dim() == 4:
        return reference.observe(cache, slot_mass, query, lse, work, scale)
    torch.ops.momentkv_cpu.observe(
        cache.kv,
        slot_mass,
        query,
        lse,
        work.first_token,
        work.queries,
        work.pages,
        work.last,
        work.observe_from,
        work.restart,
        work.logits,
        scale,
    )


def consolidate(
    cache: CacheView,
    slot_mass: torch.Tensor | None,
    work: RetireWork,
    policy: Policy,
    sink_tokens: int,
    scale: float,
) -> None:
    torch.ops.momentkv_cpu.consolidate(
        cache.kv,
        work.store_pages,
        work.retiring_pages,
        work.moment_pages,
        work.count,
        given_score(cache, slot_mass, work, policy, scale),
        mass_to_move(slot_mass, policy),
        sink_tokens,
        cache.record.has_means,
        *cache.covariance,
    )
