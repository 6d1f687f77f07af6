"""MomentKV's default score: what the moments would misrepresent, known from attention or feared from geometry."""

import torch

from momentkv_vllm.policies.base import Candidates, Observation, Policy
from momentkv_vllm.policies.key_direction import attention_weight, key_direction


class MomentKV(Policy):
    """score_j = 1 - cos(k_j, mean direction) + w alpha_j ||v_j - v'||, each term relative to its mean over the candidates.

    The second term is the paper's moment-informed score (arXiv 2606.01563, eq. 10, to zeroth order): the error that the
    last `observation_tokens` queries would have made without token j. No query has asked yet for most of what a prompt
    holds, so the first term, KeyDiff's, keeps the keys that point away from the others: they are what a later query can
    single out. Alone, either term fails: attention loses every needle that was not asked for at its eviction, the angle
    loses the running text (docs/quality.md).
    Before a sequence's first eviction v' is the mean value of the candidates themselves. w is less where a store has few runs.
    """

    name = "momentkv"
    source = "ours, after arXiv 2606.01563"
    summary = "angle of its key to the mean direction + attention x distance of its value to the mean evicted value"
    observes = Observation()
    reads = ("means",)
    native = "key_direction"

    def score(self, tokens: Candidates) -> torch.Tensor:
        return key_direction(tokens, attention_weight(self, tokens.store_tokens, tokens.run_tokens))
