"""L2 norm of the key (Devoto et al., arXiv 2406.11430)."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Policy


class KNorm(Policy):
    """score_j = -||k_j||: keys of small norm tend to receive much attention."""

    name = "knorm"
    source = "arXiv 2406.11430"
    summary = "minus the norm of its key"
    defaults = AS_PUBLISHED | {"correction": "off", "window_tokens": 16}

    def score(self, tokens: Candidates) -> torch.Tensor:
        return -tokens.keys.norm(dim=-1)
