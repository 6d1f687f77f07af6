"""Patches of vLLM's CPU worker (ledger: vllm_seams/__init__.py): heads with budgets of their own are measured, and told where
their tiles lie, when there is a KV cache; a request with a `seed` may have a prompt that takes several steps.

vLLM samples a token for every row of a step, also for a prompt that is not read to its end, and then rewinds that row's random
generator (GPUModelRunner._bookkeeping_sync, vLLM 0.32.0). CPU generators cannot be rewound, so the engine ended.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def patch_cpu_runner() -> None:
    """Wrap two methods of the CPU model runner; calling it again does nothing."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner, "_momentkv_patched", False):
        return
    sample, initialize = CPUModelRunner.sample_tokens, CPUModelRunner.initialize_kv_cache

    @functools.wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        from momentkv_vllm.attention.measuring import measure

        initialize(self, *args, **kwargs)
        measure(self)

    @functools.wraps(sample)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with _generators_of_finished_prompts(self):
            return sample(self, grammar_output)

    CPUModelRunner.sample_tokens = sample_tokens
    CPUModelRunner.initialize_kv_cache = initialize_kv_cache
    CPUModelRunner._momentkv_patched = True


@contextmanager
def _generators_of_finished_prompts(runner: Any) -> Iterator[None]:
    """Hide the generators of rows whose sampled token vLLM will discard.

    Nothing is drawn from them then, which is what rewinding is for: the answer depends on the seed, not on how the prompt was
    cut. Such a row draws from the shared generator instead.
    """
    batch = runner.input_batch
    discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    hidden = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(hidden)
