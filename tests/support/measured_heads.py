"""What the heads of a running engine hold where each has a budget of its own."""

from typing import Any

from engine import Engine
from vllm.model_executor.layers.attention import Attention


def runner_of(e: Engine) -> Any:
    return e.vllm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def capacities(e: Engine, number: int = 0) -> list[list[int]] | None:
    """Of the layers that evict, in a budget class; None where all heads hold as much."""
    layers = runner_of(e).compilation_config.static_forward_context.values()
    ours = [x.impl for x in layers if isinstance(x, Attention) and x.impl.evicts and not x.kv_sharing_target_layer_name]
    heads = [impl.heads[number] if impl.heads else None for impl in ours]
    return None if None in heads else [h.capacity.tolist() for h in heads]
