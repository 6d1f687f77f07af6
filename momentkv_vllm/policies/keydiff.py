"""KeyDiff (Park et al., arXiv 2504.15364): keep the keys that differ most from the others."""

import torch
import torch.nn.functional as F

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Policy


class KeyDiff(Policy):
    """score_j = -cos(k_j, mean of the candidates' normalised keys)."""

    name = "keydiff"
    source = "arXiv 2504.15364"
    summary = "minus the cosine of its key to the mean direction"
    defaults = AS_PUBLISHED | {"correction": "off", "window_tokens": 16}

    def score(self, tokens: Candidates) -> torch.Tensor:
        # Padding is zero and stays zero.
        anchor = F.normalize(tokens.keys, dim=-1).sum(2, keepdim=True)
        return -F.cosine_similarity(tokens.keys, anchor, dim=-1)
