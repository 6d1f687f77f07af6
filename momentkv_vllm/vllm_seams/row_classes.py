"""A patch of vLLM's CPU worker: builders of attention metadata learn which budget class each row of a step has (ledger:
vllm_seams/__init__.py). Their metadata has no request; the model runner knows those of its rows, with the extra arguments that
came with each (budget_classes.py)."""

import functools
from collections.abc import Sequence
from typing import Any

from momentkv_vllm.budget_classes import class_number
from momentkv_vllm.vllm_seams.requests import class_names_of


def patch_row_classes() -> None:
    """Wrap `_build_attention_metadata` of the CPU model runner; calling it again does nothing."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from momentkv_vllm.attention.spec_hook import EvictingBackend

    if getattr(CPUModelRunner._build_attention_metadata, "_momentkv_patched", False):
        return
    build = CPUModelRunner._build_attention_metadata

    @functools.wraps(build)
    def build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        EvictingBackend.row_classes = _row_classes(self)
        return build(self, *args, **kwargs)

    build_attention_metadata._momentkv_patched = True
    CPUModelRunner._build_attention_metadata = build_attention_metadata


def _row_classes(runner: Any) -> Sequence[int]:
    """Of the batch's rows in order; none where there is no choice: rows that are not named have the default class."""
    names = class_names_of(runner)
    if len(names) < 2:
        return ()
    settings = (runner.requests[name].sampling_params for name in runner.input_batch.req_ids)
    return [class_number(names, s and s.extra_args) for s in settings]
