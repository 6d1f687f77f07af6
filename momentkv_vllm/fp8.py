"""KV caches of 8-bit floats as the CPU attention of vLLM 0.32.0 writes and reads them (--kv-cache-dtype fp8, fp8_e4m3, fp8_e5m2).

A layer has one scale for keys and one for values, of its checkpoint, else 1. A number x is kept as `truncated(x, scale)` and
read as that times the scale.
"""

from typing import Any

import torch
from torch import Tensor

KINDS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""By vLLM's name of them."""
PAGE_TOKENS = 32
"""vLLM's CPU attention reads pages of multiples of it (vllm/v1/attention/backends/cpu_attn.py, _get_attn_isa)."""
HEAD_STEP = 32
"""Likewise heads."""


def is_fp8(numbers: torch.dtype) -> bool:
    return numbers in KINDS.values()


def kind_of(numbers: torch.dtype) -> str:
    """A name that vLLM has for such a cache."""
    return next(kind for kind, dtype in KINDS.items() if dtype is numbers)


def numbers_of(kind: str, model_dtype: torch.dtype) -> torch.dtype:
    """Of a cache that vLLM calls `kind`."""
    return KINDS.get(kind, model_dtype)


def kv_numbers(vllm_config: Any) -> torch.dtype:
    """What the model's KV cache holds. A checkpoint's scheme counts where the user says "auto"; some vLLM reads only when it
    builds the layers (vllm/model_executor/layers/attention/attention.py)."""
    kind = vllm_config.cache_config.cache_dtype
    if kind == "auto" and getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None:
        kind = "fp8"
    return numbers_of(kind, vllm_config.model_config.dtype)


def truncated(x: Tensor, scale: float, numbers: torch.dtype) -> Tensor:
    """`x` / scale in `numbers` as vLLM writes it, bit by bit: towards zero, the largest number for what is larger or NaN, and 0
    for -0. In e4m3 what is below the smallest normal number is added to that first, in float32."""
    e5m2 = numbers is torch.float8_e5m2
    mantissa, bias, normal = (2, 15, 2.0**-14) if e5m2 else (3, 7, 2.0**-6)
    x = x.float() * (torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32)).to(x.device)
    largest = torch.finfo(numbers).max
    size = x.abs().nan_to_num(nan=largest).clamp(max=largest)
    tiny = size < normal
    code = ((size + normal * tiny).view(torch.int32) >> (23 - mantissa)) - ((127 - bias) << mantissa)
    below = (size * 2.0**16).int() if e5m2 else code - (1 << mantissa)
    sign = (x < 0).int() << 7
    return (torch.where(tiny, below, code) | sign).to(torch.uint8).view(numbers)
