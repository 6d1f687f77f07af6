"""Start-up proof that we read vLLM's CPU cache the way vLLM writes it.

A wrong layout would not crash; it would answer nonsense. So the server does not start unless a few tokens stored by
vLLM's own operator come back through `CacheView`.
"""

import torch
from vllm import _custom_ops as ops

from momentkv_vllm.fp8 import is_fp8, kind_of
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.refuse import WITHOUT, refuse

SCALE = 0.75
"""Of keys and values in fp8: that vLLM multiplies where we do."""


def check_cache_layout(isa: str, spec: MomentKVSpec, numbers: torch.dtype) -> None:
    """Store one page of random tokens with vLLM's operator and read it back. Raises RuntimeError on any difference.

    Args:
        isa: instruction set that vLLM's CPU attention uses ("vec", "vec16", "neon", ...): it decides the layout.
        spec: the layers' KV cache spec.
        numbers: what the cache holds.
    """
    generator, fp8 = torch.Generator().manual_seed(0), is_fp8(numbers)
    shape = (spec.block_size, spec.num_kv_heads, spec.head_size)
    key, value = (torch.randn(shape, generator=generator).to(torch.float32 if fp8 else numbers) for _ in range(2))
    cache = torch.zeros(2, spec.num_kv_heads, spec.block_size, 2 * spec.head_size, dtype=spec.dtype)
    halves = cache.view(2, spec.num_kv_heads, 2 * spec.block_size, spec.head_size).chunk(2, dim=2)
    slots = torch.arange(spec.block_size, 2 * spec.block_size)
    scale = SCALE if fp8 else 1.0
    given = {"k_scale": scale, "v_scale": scale, "kv_cache_dtype": kind_of(numbers) if fp8 else "auto"}
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa, **given)
    view = CacheView.of_vllm_cpu(cache.view(numbers), RecordLayout(spec.head_size, False, False))
    view.key_scale = view.value_scale = scale
    read = view.read_tokens(torch.tensor([[1]]))
    for name, stored, seen in zip(("keys", "values"), (key, value), read, strict=True):
        want = view.as_stored(stored, scale).float() * scale
        if not torch.equal(want.transpose(0, 1), seen[0]):
            refuse(
                f"--kv-eviction cannot read the KV cache of this machine: vLLM's CPU attention (instruction set {isa!r}, "
                f"block size {spec.block_size}, {numbers}) stores {name} in a layout that momentkv_vllm does not know; "
                f"known are 'vec' and 'vec16'",
                "try --block-size 32",
                WITHOUT,
                error=RuntimeError,
            )
