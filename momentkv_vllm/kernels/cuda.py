"""The CUDA kernels of csrc/cuda behind the interface of reference.py, which documents every function here.

They read keys and values [num_pages, num_kv_heads, page_size, head_dim] in place, wherever vLLM's layout (NHD or HND) puts
them; head_dim 64, 128 or 256, bfloat16 or float16. Launch sizes follow from shapes alone and nothing waits for the device.
"""

import torch

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork

try:
    from momentkv_vllm import _cuda  # noqa: F401  registers torch.ops.momentkv_cuda
except ImportError as error:
    _why_missing = str(error)
else:
    _why_missing = ""

OPERATORS = ("attend",)
LEAST_CAPABILITY = (8, 0)

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


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    correct: bool,
    num_rows: torch.Tensor | None = None,
) -> None:
    """`num_rows` [1] int32: rows of `work` that are real, so that one captured launch serves smaller batches; None: all."""
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
        num_rows,
        _max_queries(work),
        scale,
        correct,
        *_covariance(cache),
    )


def register_fakes(library: str) -> None:
    """Tell torch.compile what the operators of `library` do to shapes: they write in place and return nothing."""
    for name in OPERATORS:
        torch.library.register_fake(f"{library}::{name}", lambda *args: None)


def _max_queries(work: AttendWork) -> int:
    return int(work.queries.max())


def _covariance(cache: CacheView) -> tuple[bool, torch.dtype, int]:
    record = cache.record
    return record.has_covariance, getattr(torch, record.moment_dtype), record.header_bytes


if not _why_missing:
    register_fakes("momentkv_cuda")
