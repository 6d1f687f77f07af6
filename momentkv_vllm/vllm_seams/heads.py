"""Whether the heads of a model may have budgets of their own (head_budgets.py)."""

from typing import TYPE_CHECKING

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.model_layers import full_layers, has_windows, keeps_states
from momentkv_vllm.refuse import Unsupported, refuse_first

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def settled_head_budgets(vllm_config: "VllmConfig", config: EvictionConfig, layout: StateLayout, kernels: str) -> str:
    """ "measured" or "equal". Raises ValueError if "measured" is asked for and cannot be.

    Args:
        kernels: name of the family that serves.
    """
    rows = [] if config.head_budgets == "equal" else _rows(vllm_config, config, layout, kernels)
    if config.head_budgets == "measured":
        refuse_first(
            [row._replace(way_out="use 'auto' or 'equal'") for row in rows], "kv_eviction.head_budgets='measured'"
        )
    if config.head_budgets != AUTO:
        return config.head_budgets
    return "equal" if any(row.present for row in rows) else "measured"


def _rows(vllm_config: "VllmConfig", config: EvictionConfig, layout: StateLayout, kernels: str) -> list[Unsupported]:
    model, parallel, schedule = vllm_config.model_config, vllm_config.parallel_config, layout.schedule
    first = (schedule.store_pages + schedule.retire_pages) * schedule.page_size
    return [
        Unsupported(f"store_dtype {config.store_dtype!r} (only int8, int4)", layout.packed is None),
        Unsupported(f"policy {config.policy!r}, whose score no kernel has", config.policy_class.native is None),
        Unsupported(f"kernels {kernels!r} (only 'cpu')", kernels != "cpu"),
        Unsupported(f"run_tokens {config.run_tokens} (only 8, 16)", config.run_tokens == 1),
        # Events that retire what other heads' tokens still lie in: own tiles are not enough (head_budgets.py, tiles_of).
        Unsupported(f"prefill {config.prefill!r}", config.prefill != "chunked"),
        Unsupported("prefill_retire_tokens", config.prefill_retire_tokens),
        Unsupported(
            f"budget_tokens={config.budget_tokens}, a first event of {first} tokens and a store of {schedule.store_tokens}",
            first > schedule.store_tokens,
        ),
        # A layer's tiles are laid out for one store, and the worker tells kernels of one (attention/head_reach.py).
        Unsupported(f"several budgets ({', '.join(config.class_names)})", len(config.classes) > 1),
        # Who measures must run the model alone, and all of its layers must attend as they do when they serve.
        Unsupported(
            "tensor or pipeline parallelism", parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1
        ),
        Unsupported("models with sliding-window layers", has_windows(model)),
        Unsupported("models whose other layers keep states", keeps_states(model)),
        Unsupported("models with KV sharing between layers", getattr(model.hf_text_config, "num_kv_shared_layers", 0)),
        Unsupported("models with logits soft-capping", full_layers(vllm_config).softcap),
        Unsupported("models that see or hear", model.is_multimodal_model or model.uses_mrope),
        Unsupported("--enable-lora", vllm_config.lora_config is not None),
        # A file's state would have to say where its tiles lie.
        Unsupported("state_folder", config.state_folder),
    ]
