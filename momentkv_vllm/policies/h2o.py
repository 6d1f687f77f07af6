"""H2O: heavy hitters (Zhang et al., arXiv 2306.14048)."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Observation, Policy


class H2O(Policy):
    """score_j = the attention that token j has received from all queries so far, summed over a KV head's query heads.

    Every query must be observed, below the budget too, so this policy runs our kernels from the first token.
    """

    name = "h2o"
    source = "arXiv 2306.14048"
    summary = "attention received from all queries so far"
    observes = Observation(queries="all")
    # Half of the budget is recent tokens, as published.
    defaults = AS_PUBLISHED | {"correction": "off"}

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention.clone()
