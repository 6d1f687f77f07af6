"""Start-up proof that we read vLLM's CPU cache the way vLLM writes it.

A wrong layout would not crash; it would answer nonsense. So the server does not start unless a few tokens stored by
vLLM's own operator come back through `CacheView`.
"""

import torch
from vllm import _custom_ops as ops

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.refuse import WITHOUT, refuse


def check_cache_layout(isa: str, spec: MomentKVSpec) -> None:
    """Store one page of random tokens with vLLM's operator and read it back. Raises RuntimeError on any difference.

    Args:
        isa: instruction set that vLLM's CPU attention uses ("vec", "vec16", "neon", ...): it decides the layout.
        spec: the layers' KV cache spec.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (spec.block_size, spec.num_kv_heads, spec.head_size)
    key, value = (torch.randn(shape, generator=generator).to(spec.dtype) for _ in range(2))
    cache = torch.zeros(2, spec.num_kv_heads, spec.block_size, 2 * spec.head_size, dtype=spec.dtype)
    halves = cache.view(2, spec.num_kv_heads, 2 * spec.block_size, spec.head_size).chunk(2, dim=2)
    slots = torch.arange(spec.block_size, 2 * spec.block_size)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    view = CacheView.of_vllm_cpu(cache, RecordLayout(spec.head_size, has_means=False, has_covariance=False))
    read = view.read_tokens(torch.tensor([[1]]))
    for name, stored, seen in zip(("keys", "values"), (key, value), read, strict=True):
        if not torch.equal(stored.float().transpose(0, 1), seen[0]):
            refuse(
                f"--kv-eviction cannot read the KV cache of this machine: vLLM's CPU attention (instruction set {isa!r}, "
                f"block size {spec.block_size}, {spec.dtype}) stores {name} in a layout that momentkv_vllm does not know; "
                f"known are 'vec' and 'vec16'",
                "try --block-size 32",
                WITHOUT,
                error=RuntimeError,
            )
