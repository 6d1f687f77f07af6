"""Makes an engine read a given continuation token by token, so that decoding can be judged on known text."""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from momentkv_vllm.calibrate.verdict import Judge


class ForcedTokens(AdapterLogitsProcessor):
    """A request with `extra_args={"forced": ids}` generates exactly these; its reported logprobs are the model's own.

    vLLM reports raw log-probabilities, from before processors (logprobs_mode "raw_logprobs", its default). With `"item": number`
    besides, `judge` sees all of what the model would have said.
    """

    judge: Judge

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        asked = params.extra_args or {}
        if "forced" not in asked:
            return None
        forced, number = asked["forced"], asked.get("item")

        def follow(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            place = len(output_ids)
            if place < len(forced):
                if number is not None:
                    ForcedTokens.judge.take(number, place, logits.unsqueeze(0))
                logits = torch.full_like(logits, -torch.inf)
                logits[forced[place]] = 0.0
            return logits

        return follow
