"""The score "key_direction", which kernels compute themselves: of keydiff its first term, of momentkv both."""

import torch
import torch.nn.functional as F

from momentkv_vllm.policies.base import Candidates, Policy

ATTENTION_WEIGHT = 0.25
"""w of a policy that observes attention; 0.5 and 0.25 are alike (benchmarks/research/README.md). Kernels are given it."""


FEW_RUNS, WEIGHT_OF_FEW = 16, 0.0625
"""In a store of no more runs attention has this w. As many queries are observed, and each may look at a run of its own: with the
whole w they fill the store with what is asked now, and what a later question needs goes (benchmarks/research/README.md)."""


def attention_weight(policy: Policy | type[Policy], store_tokens: int, run_tokens: int) -> float:
    """The w with which kernels compute a native policy's score in a store of `store_tokens` and runs of `run_tokens`; 0 for a
    policy that knows no attention."""
    if not policy.observes:
        return 0.0
    return ATTENTION_WEIGHT if store_tokens > FEW_RUNS * run_tokens else WEIGHT_OF_FEW


def key_direction(tokens: Candidates, attention_weight: float = 0.0) -> torch.Tensor:
    """score_j = 1 - cos(k_j, a) + w m_j ||v_j - v'||, each term relative to its mean over the candidates.

    a: the sum of the candidates' normalised keys. m_j: observed attention. v': the mean evicted value, before a sequence's first
    eviction that of the candidates. A candidate with a NaN has no part in a, nor its NaN in the candidates' mean value.

    Args:
        attention_weight: w; 0: neither attention nor moments are read.
    """
    score = _relative(tokens, _turned(tokens))
    if attention_weight == 0:
        return score
    return score + attention_weight * _relative(tokens, tokens.attention * _value_distance(tokens))


def _turned(tokens: Candidates) -> torch.Tensor:
    """[rows, heads, tokens] 1 - cosine of a key to the sum of all normalised keys."""
    # Padding is zero and stays zero.
    anchor = F.normalize(tokens.keys, dim=-1).nan_to_num(nan=0.0).sum(2, keepdim=True)
    return (1 - F.cosine_similarity(tokens.keys, anchor, dim=-1)).clamp(min=0)


def _value_distance(tokens: Candidates) -> torch.Tensor:
    """[rows, heads, tokens] distance of a value to v'."""
    own_mean = tokens.values.where(~tokens.values.isnan(), 0.0).sum(2) / tokens.valid.sum(1)[:, None, None]
    mean = torch.where((tokens.moments.count == 0)[:, None, None], own_mean, tokens.moments.mean_value)
    return (tokens.values - mean.unsqueeze(2)).norm(dim=-1)


def _relative(tokens: Candidates, x: torch.Tensor) -> torch.Tensor:
    """x over its mean; 0 if all are 0. A NaN stays one, but not in the mean: it is not to decide for the others."""
    valid = tokens.valid.unsqueeze(1)
    mean = x.nan_to_num(nan=0.0).where(valid, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
    return x / mean.clamp(min=1e-30)
