"""MomentKV's default score: what the moments would misrepresent, known from attention or feared from geometry."""

import torch

from momentkv_vllm.policies.base import Candidates, Observation, Policy

ATTENTION_WEIGHT = 0.5
"""w: more keeps running text closer to the full cache, less keeps more needles (make bench-states). Kernels
are given it."""


class MomentKV(Policy):
    """score_j = ||k_j - k'|| + w alpha_j ||v_j - v'||, each term relative to its mean over the candidates.

    The second term is the paper's moment-informed score (arXiv 2606.01563, eq. 10, to zeroth order): the error that the
    last `observation_tokens` queries would have made without token j. No query has asked yet for most of what a prompt
    holds, so the first term keeps the keys that lie far from the evicted ones: they are what a later query can single out,
    and what remains stays close to its mean, where the correction is accurate. Alone, either term fails: attention loses
    every needle that was not asked for at its eviction, distance loses the running text (README, "How good is it").
    Before a sequence's first event the means are those of the candidates themselves.
    """

    name = "momentkv"
    source = "ours, after arXiv 2606.01563"
    summary = (
        "distance of its key to the mean evicted key + attention x distance of its value to the mean evicted value"
    )
    observes = Observation()
    reads = ("means",)
    native = "moment_distance"

    def score(self, tokens: Candidates) -> torch.Tensor:
        m = tokens.moments
        keys = self._distance(tokens, tokens.keys, m.mean_key)
        values = self._distance(tokens, tokens.values, m.mean_value)
        return self._relative(tokens, keys) + ATTENTION_WEIGHT * self._relative(tokens, tokens.attention * values)

    @staticmethod
    def _distance(tokens: Candidates, points: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """[rows, heads, tokens] distance to the mean evicted point."""
        # Padding is zero.
        own_mean = points.sum(2) / tokens.valid.sum(1)[:, None, None]
        mean = torch.where((tokens.moments.count == 0)[:, None, None], own_mean, mean)
        return (points - mean.unsqueeze(2)).norm(dim=-1)

    @staticmethod
    def _relative(tokens: Candidates, x: torch.Tensor) -> torch.Tensor:
        """x over its mean; 0 if all are 0. A NaN stays one, but not in the mean: it is not to decide for the others."""
        valid = tokens.valid.unsqueeze(1)
        mean = x.nan_to_num(nan=0.0).where(valid, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
        return x / mean.clamp(min=1e-30)
