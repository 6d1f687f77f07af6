"""Patch of vLLM's CPU model runner (ledger: vllm_seams/__init__.py): a request with a `seed` may have a prompt that takes several
steps.

vLLM samples a token for every row of a step, also for a prompt that is not read to its end, and then rewinds that row's random
generator (GPUModelRunner._bookkeeping_sync, vLLM 0.32.0). CPU generators cannot be rewound, so the engine ended.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def patch_cpu_runner() -> None:
    """Wrap a method of the CPU model runner; calling it again does nothing."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner, "_momentkv_patched", False):
        return
    sample = CPUModelRunner.sample_tokens

    @functools.wraps(sample)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with _generators_of_finished_prompts(self):
            return sample(self, grammar_output)

    CPUModelRunner.sample_tokens = sample_tokens
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
