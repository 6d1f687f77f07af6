"""The CUDA kernels of csrc/cuda behind the interface of reference.py, which documents every function here.

They read keys and values [num_pages, num_kv_heads, page_size, head_dim] in place, wherever vLLM's layout (NHD or HND) puts
them; head_dim 64, 128 or 256, bfloat16 or float16. Launch sizes follow from shapes alone and nothing waits for the device
(except `attend` where `work.most_queries` is not given).
Padding, for launches captured once and replayed with smaller batches: a row of no queries and a row whose first retiring page
is -1 are skipped.
"""

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.native import given_score, mass_to_clear, mass_to_move
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Policy

try:
    from momentkv_vllm import _cuda  # noqa: F401  registers torch.ops.momentkv_cuda
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""

LEAST_CAPABILITY = (8, 0)
LIMITS = Limits((64, 128, 256), page_step=16, dtypes=(torch.bfloat16, torch.float16))
"""csrc/cuda/bindings.cpp checks the same."""

_ops = torch.ops.momentkv_cuda


def objections() -> list[str]:
    """Why this family cannot run here."""
    if _why_missing:
        return [
            f"the extension momentkv_vllm._cuda is not built ({_why_missing}): reinstall with MOMENTKV_BUILD_CUDA=1, nvcc and "
            "a CUDA build of torch"
        ]
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return [
            f"compute capability {capability[0]}.{capability[1]} < 8.0 (bfloat16 tensor cores, asynchronous copies)"
        ]
    return []


def store(
    cache: CacheView, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, slot_mass: torch.Tensor | None
) -> None:
    _ops.store(cache.keys, cache.values, key, value, slots, mass_to_clear(cache, slot_mass, slots))


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    correct: bool,
) -> None:
    _ops.attend(
        cache.keys,
        cache.values,
        query,
        output,
        lse,
        work.first_token,
        work.queries,
        work.pages,
        work.last,
        work.moment_pages,
        work.count,
        work.query_bound(),
        scale,
        correct,
        *cache.covariance,
    )


def observe(
    cache: CacheView,
    slot_mass: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    work: AttendWork,
    scale: float,
) -> None:
    if slot_mass.dim() == 4:
        return reference.observe(cache, slot_mass, query, lse, work, scale)
    _ops.observe(
        cache.keys,
        cache.values,
        slot_mass,
        query,
        lse,
        work.first_token,
        work.queries,
        work.pages,
        work.last,
        work.observe_from,
        work.restart,
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
    _ops.consolidate(
        cache.keys,
        cache.values,
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


def register_fakes(library: str) -> None:
    """Tell torch.compile what the operators of `library` do to shapes: they write in place and return nothing."""
    for name in ("store", "attend", "observe", "consolidate"):
        torch.library.register_fake(f"{library}::{name}", lambda *args: None)


if not _why_missing:
    register_fakes("momentkv_cuda")
