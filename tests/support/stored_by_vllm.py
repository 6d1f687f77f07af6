"""What vLLM's own operator writes into an fp8 cache."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from momentkv_vllm.fp8 import PAGE_TOKENS

needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM writes fp8 with AVX-512 only")


def stored_by_vllm(x: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """Bytes [pages, heads, bytes of a head] after vLLM has written keys and values `x` [tokens, heads, d] to all slots."""
    current_platform.import_kernels()
    cache = torch.zeros(len(x) // PAGE_TOKENS, x.shape[1], PAGE_TOKENS, 2 * x.shape[2], dtype=torch.uint8)
    halves = cache.view(len(cache), x.shape[1], 2 * PAGE_TOKENS, x.shape[2]).chunk(2, dim=2)
    given = {"k_scale": scale, "v_scale": 2 * scale, "kv_cache_dtype": kind}
    ops.cpu_attn_reshape_and_cache(x, x.clone(), *halves, torch.arange(len(x)), "vec", **given)
    return cache.flatten(2)
