"""Patch of vLLM's worker (ledger: vllm_seams/__init__.py): when there is a KV cache, what heads of a model do is measured, and
on a GPU every kernel is launched once."""

import functools
from typing import Any


def measures(device_type: str) -> bool:
    """Whether workers of such devices measure what heads do (attention/measuring.py)."""
    return device_type in ("cpu", "cuda")


def patch_worker() -> None:
    """Wrap `Worker.initialize_from_config`, which CPU and GPU workers call once, with either model runner, before CUDA graphs are
    captured; calling it again does nothing.

    `initialize_kv_cache` of a GPU's runner is no place for it: that also makes the small cache on which vLLM captures graphs to
    find out what they take, and throws away.
    """
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker.initialize_from_config, "momentkv_measures"):
        return
    initialize = Worker.initialize_from_config

    @functools.wraps(initialize)
    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> None:
        from momentkv_vllm.attention.measuring import measure
        from momentkv_vllm.attention.warm_up import warm_up_runner

        initialize(self, *args, **kwargs)
        measure(self.model_runner)
        warm_up_runner(self.model_runner)

    initialize_from_config.momentkv_measures = True
    Worker.initialize_from_config = initialize_from_config
