"""SnapKV: attention of an observation window, smoothed over neighbours (Li et al., arXiv 2404.14469)."""

import torch
import torch.nn.functional as F

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Observation, Policy

KERNEL = 5
"""Width of the average over neighbouring tokens (odd)."""


class SnapKV(Policy):
    """score_j = attention from the last `observation_tokens` queries, averaged over the 5 tokens around j.

    Neighbours exist at the first event only, when all candidates still lie in order; later the store is a set.
    """

    name = "snapkv"
    source = "arXiv 2404.14469"
    summary = "attention of the last 32 queries, smoothed; prompt read in full"
    observes = Observation()
    reads = ("order",)
    # The observation window is kept.
    defaults = AS_PUBLISHED | {"correction": "off", "prefill": "full", "window_tokens": 32, "observation_tokens": 32}

    def score(self, tokens: Candidates) -> torch.Tensor:
        first = (tokens.moments.count == 0)[:, None, None]
        smooth = F.avg_pool1d(tokens.attention, KERNEL, stride=1, padding=KERNEL // 2)
        return torch.where(first, smooth, tokens.attention)
