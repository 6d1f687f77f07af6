"""The Triton kernels of triton_kernels/ behind the interface of reference.py, which documents every function here.

They address caches by strides, so they run on vLLM's CUDA layout and, in Triton's interpreter (TRITON_INTERPRET=1), on the
CPU's. Nothing here waits for the device, except for policies other than momentkv's and observed logits.
"""

import os

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.native import given_score, mass_to_clear, mass_to_move
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Policy
from momentkv_vllm.policies.momentkv import ATTENTION_WEIGHT

try:
    from momentkv_vllm.triton_kernels import attend_chunk as _chunk
    from momentkv_vllm.triton_kernels import attend_decode as _decode
    from momentkv_vllm.triton_kernels import consolidate as _consolidate
    from momentkv_vllm.triton_kernels import observe as _observe
    from momentkv_vllm.triton_kernels import store as _store
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


def store(
    cache: CacheView, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, slot_mass: torch.Tensor | None
) -> None:
    _store.store(cache, key, value, slots, mass_to_clear(cache, slot_mass, slots))


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    correct: bool,
) -> None:
    most = work.query_bound()
    correct = correct and cache.record.has_means
    if not work.only_chunks:
        _decode.attend_decode(cache, query, output, lse, work, scale, correct)
    if most > 1:
        _chunk.attend_chunk(cache, query, output, lse, work, scale, correct, most)


def observe(
    cache: CacheView, slot_mass: torch.Tensor, query: torch.Tensor, lse: torch.Tensor, work: AttendWork, scale: float
) -> None:
    if slot_mass.dim() == 4:
        return reference.observe(cache, slot_mass, query, lse, work, scale)
    _observe.observe(cache, slot_mass, query, lse, work, scale)


def consolidate(
    cache: CacheView,
    slot_mass: torch.Tensor | None,
    work: RetireWork,
    policy: Policy,
    sink_tokens: int,
    scale: float,
) -> None:
    score = given_score(cache, slot_mass, work, policy, scale)
    moves_mass = mass_to_move(slot_mass, policy) is not None
    _consolidate.consolidate(cache, slot_mass, score, work, sink_tokens, ATTENTION_WEIGHT, moves_mass)
