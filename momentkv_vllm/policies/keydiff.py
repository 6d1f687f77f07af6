"""KeyDiff (Park et al., arXiv 2504.15364): keep the keys that differ most from the others."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Policy
from momentkv_vllm.policies.key_direction import key_direction


class KeyDiff(Policy):
    """score_j = 1 - cos(k_j, mean of the candidates' normalised keys), relative to its mean: the paper's order."""

    name = "keydiff"
    source = "arXiv 2504.15364"
    summary = "minus the cosine of its key to the mean direction"
    defaults = AS_PUBLISHED | {"correction": "off", "window_tokens": 16}
    native = "key_direction"

    def score(self, tokens: Candidates) -> torch.Tensor:
        return key_direction(tokens)
