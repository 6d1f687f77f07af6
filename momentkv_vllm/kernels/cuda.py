"""The CUDA kernels of csrc/cuda; base.py documents the operations.

They read the cache in place, wherever vLLM's layout (NHD or HND) puts it. Launch sizes follow from shapes alone and nothing
waits for the device (except `attend` where `work.most_queries` is not given). Padding, for launches captured once and replayed
with smaller batches: a row of no queries and a row whose first retiring page is -1 are skipped.
"""

import torch

from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork

try:
    from momentkv_vllm import _cuda  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.momentkv_cuda
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""

_ops = torch.ops.momentkv_cuda


class Cuda(KernelFamily):
    """Not measured yet, so "auto" does not take it. csrc/cuda checks the limits too."""

    name = "cuda"
    devices = ("cuda",)
    limits = Limits((64, 128, 256), page_step=16, dtypes=(torch.bfloat16, torch.float16), stores=False, softcaps=False)
    by_name_only = True

    def objections(self) -> list[str]:
        if _why_missing:
            return [
                f"the extension momentkv_vllm._cuda is not built ({_why_missing}): reinstall with MOMENTKV_BUILD_CUDA=1, nvcc "
                "and a CUDA build of torch"
            ]
        if not torch.cuda.is_available():
            return ["no CUDA device"]
        major, minor = torch.cuda.get_device_capability()
        needs = "bfloat16 tensor cores, asynchronous copies"
        return [] if major >= 8 else [f"compute capability {major}.{minor} < 8.0 ({needs})"]

    def _write(self, cache: CacheView, key, value, slots, mass) -> None:
        _ops.write(cache.keys, cache.values, key, value, slots, mass)

    def attend(self, cache: CacheView, query, output, lse, work: AttendWork, scale: float, corrected: bool) -> None:
        given = query, output, lse, *work.arguments(), scale, corrected
        _ops.attend(cache.keys, cache.values, *given, *cache.record_arguments, work.query_bound())

    def _observe(self, cache: CacheView, mass, query, lse, work: AttendWork, scale: float) -> None:
        _ops.observe(cache.keys, cache.values, mass, query, lse, *work.arguments(), scale)

    def _consolidate(self, cache: CacheView, mass, work: RetireWork, score, sink_tokens: int, attention_weight) -> None:
        given = *work.arguments(), score, mass, sink_tokens
        _ops.consolidate(cache.keys, cache.values, *given, *cache.record_arguments)


def register_fakes(library: str) -> None:
    """Tell torch.compile what the operators of `library` do to shapes: they write in place and return nothing."""
    for name in ("write", "attend", "observe", "consolidate"):
        torch.library.register_fake(f"{library}::{name}", lambda *args: None)


if not _why_missing:
    register_fakes("momentkv_cuda")
