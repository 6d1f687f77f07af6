"""What serving on a GPU needs and refuses. Its kernels are checked in Triton's interpreter; none of it has run on a GPU yet."""

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import ALLOW_UNTESTED_GPU
from momentkv_vllm.kernels.observed import page_bytes
from momentkv_vllm.model_layers import has_windows, sharing_layers
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


def patch_gpu_worker() -> None:
    """What was observed of tokens lies beside vLLM's pages, in the memory that vLLM would give to pages (ledger:
    vllm_seams/__init__.py); calling it again does nothing."""
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, "_momentkv_patched", False):
        return
    available = Worker.determine_available_memory

    @functools.wraps(available)
    def determine_available_memory(self: Any) -> int:
        return for_pages(available(self), self.model_runner.get_kv_cache_spec().values())

    Worker.determine_available_memory = determine_available_memory
    Worker._momentkv_patched = True


def for_pages(available: int, specs: Iterable[Any]) -> int:
    """Bytes of `available` that are left for pages of layers with these KV cache specs, what they observe taken off."""
    specs = list(specs)
    pages = sum(spec.page_size_bytes for spec in specs)
    beside = sum(_observed_bytes(spec) for spec in specs)
    return available * pages // (pages + beside) if beside else available


def _observed_bytes(spec: Any) -> int:
    """Of a page in one layer; 0 where nothing is observed."""
    from momentkv_vllm.kv_spec import MomentKVSpec

    if not isinstance(spec, MomentKVSpec) or not spec.observes_attention:
        return 0
    packed, head = spec.layout.packed, spec.page_size_bytes // spec.num_kv_heads
    slots = max(spec.block_size, packed.tokens_per_page(head) if packed else 0)
    return page_bytes(spec.num_kv_heads, slots, spec.config.policy_class.observes.what)


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
            "models with sliding-window layers on a GPU, whose layers all get the work lists of one kind of step",
            has_windows(vllm_config.model_config),
        ),
        Unsupported(
            "models with KV sharing between layers on a GPU, where all layers evict after the last one with a cache",
            sharing_layers(vllm_config.model_config),
        ),
        Unsupported("speculative decoding on a GPU", drafts, "leave --speculative-config out"),
        Unsupported(
            f"several budgets ({', '.join(config.class_names)}) on a GPU, which plans its steps with one schedule",
            len(config.classes) > 1,
            "give --kv-budget one number",
        ),
    ]
