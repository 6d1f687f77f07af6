"""MomentKV's default score: distance of a key to the mean evicted key."""

import torch

from momentkv_vllm.policies.base import Candidates, Policy


class MomentKV(Policy):
    """score_j = ||k_j - k'||: what stays is what the moments describe worst.

    The evicted keys stay close together, which is what makes the first-order expansion of the correction accurate, and
    no attention is needed, so a token that no query has asked for yet can still be kept. Beat attention-based scores
    on retrieval in every run at 1/4 of the context (README, "Quality").
    Before a sequence's first event the mean is that of the candidates themselves.
    """

    name = "momentkv"
    needs_means = True
    is_key_distance = True

    def score(self, tokens: Candidates) -> torch.Tensor:
        weight = tokens.valid[:, None, :, None].to(tokens.keys.dtype)
        own_mean = (tokens.keys * weight).sum(2) / weight.sum(2)
        first = (tokens.moments.count == 0)[:, None, None]
        mean = torch.where(first, own_mean, tokens.moments.mean_key)
        return (tokens.keys - mean.unsqueeze(2)).norm(dim=-1)
