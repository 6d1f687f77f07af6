"""TOVA: attention of the newest query (Oren et al., arXiv 2401.06104)."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Observation, Policy


class TOVA(Policy):
    """score_j = attention that the last query before the event gives to token j.

    The original averages over all heads of a layer; here every KV head decides by its own query heads, because tensor
    parallel workers see only their share of the heads and must not answer differently.
    """

    name = "tova"
    source = "arXiv 2401.06104"
    summary = "attention of the newest query"
    observes = Observation()
    defaults = AS_PUBLISHED | {"correction": "off", "window_tokens": 16, "observation_tokens": 1}

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention.clone()
