"""What serving on a GPU needs and refuses. Its kernels are checked in Triton's interpreter; none of it has run on a GPU yet."""

import logging
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import ALLOW_UNTESTED_GPU
from momentkv_vllm.refuse import Unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

BACKEND_NAMES = {"cpu": "CPU_ATTN", "cuda": "CUSTOM"}
"""vLLM's name of our attention backend by device type."""


def choose_backend(engine_args: Any) -> Any:
    """On CUDA, name our backend, unless the user names one (which is refused then); returns what the user named."""
    from vllm.config import AttentionConfig
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    named = AttentionConfig.validate_backend_before(engine_args.attention_backend)  # None for "auto"
    chosen = named or engine_args.attention_config.backend
    if current_platform.is_cuda() and chosen is None:
        engine_args.attention_backend = AttentionBackendEnum.CUSTOM
    return chosen


def gpu_rows(platform: Any, vllm_config: "VllmConfig", config: EvictionConfig) -> list[Unsupported]:
    """What eviction cannot serve on this device; nothing on a CPU."""
    if platform.is_cpu():
        return []
    device = f"the device {platform.device_type!r}"
    if not platform.is_cuda():
        return [Unsupported(f"{device} (only CPUs, and CUDA untested)", True)]
    insists = ALLOW_UNTESTED_GPU.is_on()
    if insists:
        logger.warning(
            "momentkv: %s=1: the CUDA backend has not been run on a GPU yet; its kernels were checked in Triton's interpreter",
            ALLOW_UNTESTED_GPU.name,
        )
    untested = f"{device}: the CUDA backend has not been run on a GPU yet, only in Triton's interpreter"
    drafts = vllm_config.speculative_config is not None
    return [
        Unsupported(untested, not insists, f"insist with {ALLOW_UNTESTED_GPU.name}=1"),
        Unsupported(
            f"prefill {config.prefill!r} on a GPU",
            config.prefill != "chunked",
            "use --kv-eviction-config.prefill chunked",
        ),
        Unsupported(
            f"prefill_retire_tokens={config.prefill_retire_tokens} on a GPU, whose steps know no prompt lengths yet",
            config.prefill_retire_tokens is not None,
            "leave prefill_retire_tokens out",
        ),
        Unsupported("speculative decoding on a GPU", drafts, "leave --speculative-config out"),
    ]
