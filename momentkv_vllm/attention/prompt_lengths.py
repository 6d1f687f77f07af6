"""How long the prompts of a step's rows are, which page schedules with a grain of their own for prompts ask for.

CommonAttentionMetadata.rswa_prefix_lens is the only field of vLLM's that carries it, and runners fill it for models that a
setting names (vllm/v1/worker/gpu_model_runner.py, gpu/model_runner.py, vLLM 0.32.0).
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from momentkv_vllm.page_schedule import PageSchedule


def ask_for_prompt_lengths(builder: Any, schedules: tuple[PageSchedule, ...], vllm_config: VllmConfig) -> None:
    """Makes the runner hand prompt lengths to builders where a schedule reads them; the builder's own attention hides nothing.

    Backends of layers read the setting while they are chosen, which is over by now; vLLM's builders read it in their
    constructor, one of which ran before (ledger of patches: vllm_seams/__init__.py).
    """
    if not any(schedule.reads_prompt_lengths for schedule in schedules):
        return
    vllm_config.model_config.model_arch_config.rswa_window = vllm_config.model_config.max_model_len
    # A second builder of the process has found the setting already, and would mask by it.
    builder.rswa_window = None


def prompt_lengths(common: CommonAttentionMetadata, rows: int) -> list[int]:
    """Of the first rows; zeros where nobody asked. On a GPU, vLLM's V2 runner has them there, and this waits for the device."""
    prompts = common.rswa_prefix_lens
    return [0] * rows if prompts is None else prompts[:rows].tolist()


def on_device(common: CommonAttentionMetadata, rows: int, device: torch.device) -> torch.Tensor | None:
    """[rows] on `device`; None where nobody asked, and while graphs are captured."""
    prompts = common.rswa_prefix_lens
    if prompts is None:
        return None
    prompts = prompts[:rows]
    if prompts.device.type == "cpu" and device.type == "cuda":
        # The runner writes the next step's over them before the device has read these.
        prompts = torch.empty(rows, dtype=prompts.dtype, pin_memory=True).copy_(prompts)
    return prompts.to(device, non_blocking=True)
