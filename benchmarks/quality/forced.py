"""Makes an engine read a given continuation token by token, so that decoding can be judged on known text."""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedTokens(AdapterLogitsProcessor):
    """A request with `extra_args={"forced": ids}` generates exactly these; its reported logprobs are the model's own.

    vLLM reports raw log-probabilities, from before processors (logprobs_mode "raw_logprobs", its default).
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def follow(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output_ids) < len(forced):
                logits = torch.full_like(logits, -torch.inf)
                logits[forced[len(output_ids)]] = 0.0
            return logits

        return follow
