"""The CUDA attention backend on vLLM's FlashAttention (vllm/v1/attention/backends/flash_attn.py, vLLM 0.32.0), which stock vLLM
takes on an H100. It reads the same cache."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version, uses_fa4_hd256_kernel
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from momentkv_vllm.attention.cuda_backend import (
    CudaEvictingBackend,
    CudaEvictingBuilder,
    CudaEvictingImpl,
    CudaEviction,
)


@dataclass
class FlashMomentKVMetadata(CudaEviction, FlashAttentionMetadata):
    """vLLM's and ours."""


class FlashMomentKVMetadataBuilder(CudaEvictingBuilder, FlashAttentionMetadataBuilder):
    """Builds both. FlashAttention 3 plans a batch in one buffer of the builder's, which CUDA graphs read: in a step that evicts,
    the rows that vLLM serves are planned alone."""

    metadata = FlashMomentKVMetadata


class FlashMomentKVImpl(CudaEvictingImpl, FlashAttentionImpl):
    """One layer."""


class FlashMomentKVBackend(CudaEvictingBackend, FlashAttentionBackend):
    """Names the two above."""

    impl, builder = FlashMomentKVImpl, FlashMomentKVMetadataBuilder

    @classmethod
    def validate_configuration(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype, *args, **kwargs) -> list[str]:
        """vLLM's reasons, and ours, why FlashAttention cannot serve a layer in the pages that we choose."""
        reasons = super().validate_configuration(head_size, dtype, kv_cache_dtype, *args, **kwargs)
        if get_flash_attn_version(head_size=head_size) is None:
            reasons.append("no version of FlashAttention loads on this device")
        if uses_fa4_hd256_kernel(head_size):
            reasons.append(f"FlashAttention 4 wants pages of 128 tokens for head_size {head_size} on this device")
        return reasons
