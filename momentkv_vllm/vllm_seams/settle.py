"""What "auto" means for a model on this machine, decided once, before anything is loaded, and told to every process."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.fp8 import kv_numbers
from momentkv_vllm.kernels import select
from momentkv_vllm.kv_spec import expected_layout, settled
from momentkv_vllm.model_layers import full_layers
from momentkv_vllm.vllm_seams.heads import settled_head_budgets, settled_key_rounding

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")


def settled_config(vllm_config: "VllmConfig", config: EvictionConfig) -> EvictionConfig:
    """`config` without "auto" where the model or the kernels decide. Raises ValueError if no kernels can serve it."""
    from vllm.platforms import current_platform

    layout = expected_layout(config, vllm_config)
    numbers, device = kv_numbers(vllm_config), current_platform.device_type
    try:
        family = select(config.kernels, device, layout.cache_shape(numbers, full_layers(vllm_config).softcap))
    except ValueError as error:
        if config.store_dtype != AUTO or layout.packed is None:
            raise
        logger.warning("momentkv: store_dtype auto is model, not %s: %s", layout.packed.dtype, error)
        return settled_config(vllm_config, replace(config, store_dtype="model"))
    config = settled(config, layout.schedule.page_size, layout.record.head_dim, numbers)
    return replace(
        config,
        head_budgets=settled_head_budgets(config, layout, family, device),
        key_rounding=settled_key_rounding(config, layout, family, device),
    )
