"""VATP: the value matters too (Guo et al., arXiv 2406.12335)."""

import torch

from momentkv_vllm.policies import Candidates, Observation, Policy


class VATP(Policy):
    """score_j = attention of the last queries to token j, times the L1 norm of its value."""

    name = "vatp"
    source = "arXiv 2406.12335"
    summary = "attention of the last queries x L1 norm of its value"
    observes = Observation(queries="last", what="mass")
    defaults = {"correction": "off", "observation_tokens": 16}

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention * tokens.values.abs().sum(-1)
