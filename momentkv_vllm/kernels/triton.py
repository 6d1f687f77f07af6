"""The Triton kernels of triton_kernels/ behind the interface of reference.py, which documents every function here.

They address caches by strides, so they run on vLLM's CUDA layout and, in Triton's interpreter (TRITON_INTERPRET=1), on the
CPU's. Nothing here waits for the device, except for policies other than momentkv's and observed logits.
"""

import os

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.native import given_score, mass_to_clear
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Policy
from momentkv_vllm.policies.momentkv import ATTENTION_WEIGHT

try:
    from momentkv_vllm.triton_kernels import attend_chunk as _chunk
    from momentkv_vllm.triton_kernels import attend_decode as _decode
    from momentkv_vllm.triton_kernels import consolidate as _consolidate
    from momentkv_vllm.triton_kernels import observe as _observe
    from momentkv_vllm.triton_kernels import write as _write
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""


LIMITS = Limits(range(1, 257), page_step=16, dtypes=(torch.float32, torch.bfloat16, torch.float16))
"""Tiles of larger heads have not been compiled: they must fit into shared memory."""


def objections() -> list[str]:
    """Why this family cannot run here."""
    if _why_missing:
        return [f"Triton cannot be imported ({_why_missing}): pip install triton"]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return ["no CUDA GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, very slowly)"]
    return []


def write(
    cache: CacheView, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, observed: torch.Tensor | None
) -> None:
    _write.write(cache, key, value, slots, mass_to_clear(cache, observed, slots))


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    corrected: bool,
) -> None:
    most = work.query_bound()
    corrected = corrected and cache.record_layout.has_means
    if not work.only_chunks:
        _decode.attend_decode(cache, query, output, lse, work, scale, corrected)
    if most > 1:
        _chunk.attend_chunk(cache, query, output, lse, work, scale, corrected, most)


def observe(
    cache: CacheView, observed: torch.Tensor, query: torch.Tensor, lse: torch.Tensor, work: AttendWork, scale: float
) -> None:
    if observed.dim() == 4:
        return reference.observe(cache, observed, query, lse, work, scale)
    _observe.observe(cache, observed, query, lse, work, scale)


def consolidate(
    cache: CacheView,
    observed: torch.Tensor | None,
    work: RetireWork,
    policy: Policy,
    sink_tokens: int,
    scale: float,
) -> None:
    score = given_score(cache, observed, work, policy, scale)
    moves_mass = observed is not None and not policy.observes_logits
    _consolidate.consolidate(cache, observed, score, work, sink_tokens, ATTENTION_WEIGHT, moves_mass)
