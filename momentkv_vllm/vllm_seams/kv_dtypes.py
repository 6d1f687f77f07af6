"""What --kv-cache-dtype may be (fp8.py), and the pages that fp8 needs."""

from typing import TYPE_CHECKING, Any

from momentkv_vllm.model_layers import full_layers
from momentkv_vllm.refuse import WITHOUT, Unsupported, refuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# fp8.py is imported late: torch must not be touched by processes that only parse options.


def keeps_fp8(vllm_config: "VllmConfig") -> bool:
    from momentkv_vllm.fp8 import is_fp8, kv_numbers

    return is_fp8(kv_numbers(vllm_config))


def dtype_rows(vllm_config: "VllmConfig", platform: Any) -> list[Unsupported]:
    """What eviction cannot serve, and what vLLM's CPU attention would refuse after loading."""
    import torch

    from momentkv_vllm.fp8 import HEAD_STEP, KINDS

    model, cache, head_size = vllm_config.model_config, vllm_config.cache_config, full_layers(vllm_config).head_size
    option, auto, stock = f"--kv-cache-dtype {cache.cache_dtype}", "use --kv-cache-dtype auto", "also without eviction"
    known = "auto", str(model.dtype).removeprefix("torch."), *KINDS
    rows = [
        Unsupported(
            f"{option} (only auto, i.e. the model's dtype, and on a CPU {', '.join(KINDS)})",
            cache.cache_dtype not in known,
            auto,
        )
    ]
    if not keeps_fp8(vllm_config):
        return rows
    able = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    return [
        *rows,
        Unsupported(f"{option}: an fp8 KV cache on a GPU", not platform.is_cpu(), "use --kv-cache-dtype of the model"),
        Unsupported(f"{option}: an fp8 KV cache on a CPU without AVX-512 ({stock})", not able, auto),
        Unsupported(
            f"{option} for heads of {head_size} numbers (an fp8 KV cache needs multiples of {HEAD_STEP}, {stock})",
            head_size % HEAD_STEP,
            auto,
        ),
        Unsupported(
            f"--kv-cache-dtype-skip-layers {' '.join(cache.kv_cache_dtype_skip_layers)} (pages of fp8 alone)",
            cache.kv_cache_dtype_skip_layers,
            "leave the option out",
        ),
    ]


def refuse_fp8_pages(vllm_config: "VllmConfig") -> None:
    """Raises ValueError on pages that vLLM's CPU attention cannot read in fp8."""
    from momentkv_vllm.fp8 import PAGE_TOKENS

    page_size = vllm_config.cache_config.block_size
    if page_size % PAGE_TOKENS and keeps_fp8(vllm_config):
        refuse(
            f"--block-size {page_size} is not a multiple of {PAGE_TOKENS}, which an fp8 KV cache needs on a CPU",
            "change it", "leave it out", WITHOUT,
        )  # fmt: skip
