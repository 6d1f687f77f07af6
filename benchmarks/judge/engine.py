"""The judge's items in a real vLLM engine in this process: prompts are read, answers decoded token by token."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from judge.material import Item
from judge.verdict import Judge

# One process, so that the logits can be handed over; read when vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel  # noqa: E402
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor  # noqa: E402

SEQUENCES = 8
"""Sequences at a time."""


class Follow(AdapterLogitsProcessor):
    """A request with `extra_args={"item": number}` says that item's answer, and `judge` sees what the model would have said."""

    judge: Judge

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        number = (params.extra_args or {}).get("item")
        if number is None:
            return None
        answer = Follow.judge.items[number].answer

        def follow(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            place = len(output_ids)
            if place < len(answer):
                Follow.judge.take(number, place, logits.unsqueeze(0))
                logits = torch.full_like(logits, -torch.inf)
                logits[answer[place]] = 0.0
            return logits

        return follow


class Engine:
    """options: as `vllm.LLM` takes them."""

    def __init__(self, model: str, **options: Any) -> None:
        self.llm = LLM(
            model, logits_processors=[Follow], max_num_seqs=SEQUENCES, max_num_batched_tokens=2048, seed=0, **options
        )

    def ask(self, items: Sequence[Item], judge: Judge) -> None:
        """Everything about `items` to `judge`. Raises RuntimeError if the engine says anything else."""
        Follow.judge = judge
        params = [
            SamplingParams(temperature=0, max_tokens=len(item.answer), ignore_eos=True, extra_args={"item": number})
            for number, item in enumerate(items)
        ]
        prompts = [{"prompt_token_ids": list(item.prompt)} for item in items]
        for item, said in zip(items, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
            if tuple(said.outputs[0].token_ids) != item.answer:
                raise RuntimeError("the engine did not follow the answer")

    def close(self) -> None:
        """Another engine may follow in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()
