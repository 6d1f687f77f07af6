"""H2O: heavy hitters (Zhang et al., arXiv 2306.14048)."""

import torch

from momentkv_vllm.policies.base import Candidates, Policy


class H2O(Policy):
    """score_j = the attention that token j has received from all queries so far, summed over a KV head's query heads.

    Every query must be observed, below the budget too, so this policy runs our kernels from the first token.
    """

    name = "h2o"
    needs_attention = True
    observes_all_queries = True

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention.clone()
