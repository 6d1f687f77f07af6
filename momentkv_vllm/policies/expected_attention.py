"""Expected attention (Devoto et al., arXiv 2510.00636): the attention that a Gaussian query would give."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Observation, Policy


class ExpectedAttention(Policy):
    """score_j = E[exp(q.k_j / sqrt(d))] ||v_j||, with Gaussian logits: exp(mean + variance / 2).

    Mean and variance are those of the observed queries' logits. The original takes them from a Gaussian of the queries before
    RoPE, rotated to the next 512 positions; an attention backend only ever sees rotated queries.
    """

    name = "expected_attention"
    source = "arXiv 2510.00636"
    summary = "expected attention of a Gaussian query x norm of its value; prompt read in full"
    observes = Observation(what="logits")
    defaults = AS_PUBLISHED | {"correction": "off", "prefill": "full", "window_tokens": 16, "observation_tokens": 128}

    def score(self, tokens: Candidates) -> torch.Tensor:
        count, total, squares = tokens.attention.unbind(-1)
        count = count.clamp(min=1)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        # The logarithm of the score: the same order, and it cannot overflow.
        return mean + variance / 2 + tokens.values.norm(dim=-1).log()
