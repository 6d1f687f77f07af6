"""Models with layers that keep a state (Mamba, gated DeltaNet, short convolutions) beside layers that attend, which evict.

One pool serves both, so vLLM makes its blocks as large as a state, after the model is loaded. Ours are split into pages
(page_blocks.py). What a user should know of that is found and said before anything is loaded.
"""

import copy
import logging
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.model_layers import full_layers, has_mamba, has_windows, keeps_states
from momentkv_vllm.refuse import Unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

SENSIBLE_BLOCKS = 2
"""A sequence holds up to two blocks more than its budget: with a smaller one, most of what it holds is not budget."""


def align_blocks(vllm_config: "VllmConfig") -> None:
    """Give the configuration the block size that vLLM would choose after loading (Platform._align_hybrid_block_size); it
    changes nothing then. Nothing on a GPU, where such models are refused."""
    from vllm.platforms import current_platform

    from momentkv_vllm.attention.cpu_backend import MomentKVBackend

    if not current_platform.is_cpu():
        return
    # vLLM writes more than the block size, and finds no layers yet: a copy takes that.
    trial = copy.copy(vllm_config)
    trial.cache_config = copy.copy(vllm_config.cache_config)
    current_platform._align_hybrid_block_size(trial, MomentKVBackend)
    vllm_config.cache_config.block_size = trial.cache_config.block_size


def say_what_blocks_cost(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    """A line about the blocks, and a warning where most of a sequence's memory would be their rounding."""
    from momentkv_vllm.kv_spec import expected_schedules
    from momentkv_vllm.page_blocks import PageBlocks

    size = vllm_config.cache_config.block_size
    for served, schedule in zip(config.classes, expected_schedules(config, vllm_config), strict=True):
        if not served.evicts:
            continue
        held, budget = PageBlocks.of(schedule, size).budget, served.config.budget_tokens
        sensible = SENSIBLE_BLOCKS * size
        say = logger.warning if budget < sensible else logger.info
        say(
            "momentkv: vLLM's blocks are as large as a state of this model's other layers, %d tokens; pages are %d, and a "
            "sequence with --kv-budget %d holds up to %d blocks, the memory of %d tokens; the least sensible budget is %d",
            size, schedule.page_size, budget, held, held * size, sensible,
        )  # fmt: skip


def hybrid_rows(vllm_config: "VllmConfig", platform: Any) -> list[Unsupported]:
    """What eviction cannot serve of such models; nothing of others."""
    model, layers = vllm_config.model_config, full_layers(vllm_config)
    if not keeps_states(model):
        return []
    staged = vllm_config.parallel_config.pipeline_parallel_size > 1
    unmanaged = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    what = "of hybrid models (Mamba, linear attention, ... beside attention)"
    return [
        Unsupported(f"GPUs for layers {what}", not platform.is_cpu()),
        Unsupported(f"sliding windows {what}", has_windows(model)),
        Unsupported(
            f"{layers.count} attention layers and {layers.others} others {what} (fewer than 1.5 times as many as those)",
            layers.others and layers.count >= 1.5 * layers.others,
        ),
        Unsupported(f"speculative decoding {what}", vllm_config.speculative_config, "leave --speculative-config out"),
        Unsupported(
            "--enable-prefix-caching of models with Mamba layers on a CPU (vLLM's engine ends at a prompt of several steps, also "
            "without eviction)",
            has_mamba(model) and vllm_config.cache_config.enable_prefix_caching,
            "leave the option out",
        ),
        Unsupported(f"pipeline parallelism {what}", staged, "use tensor or data parallelism"),
        Unsupported(f"--disable-hybrid-kv-cache-manager {what}", unmanaged, "leave the option out"),
    ]
