"""The paper's moment-informed score (arXiv 2606.01563, eq. 10)."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Observation, Policy
from momentkv_vllm.softcap import slope

POOL = 4
"""Neighbouring tokens pooled before scoring (the paper's protocol)."""


class Paper(Policy):
    """score_j = alpha_j ||v_j - v' - C k_j / sqrt(d)||, with alpha the attention mass over the last observed queries.
    Capped logits flatten the step of C (moments.py, `partial`).

    Pooling in chunks of 4 needs neighbours, so it applies to the first event only, when all candidates still lie in
    order; later the store is a set. The paper's split of the budget over heads (Ada-KV) is not made: every head of a
    page has the same number of slots.
    """

    name = "paper"
    source = "arXiv 2606.01563"
    summary = "attention x how badly the moments predict its value (eq. 10); prompt read in full"
    observes = Observation()
    reads = ("means", "covariance", "order")
    # Section "Protocol": evict after the prompt, one sink, the last 32 queries observed and kept.
    defaults = AS_PUBLISHED | {
        "correction": "first", "prefill": "full", "sink_tokens": 1, "window_tokens": 32, "observation_tokens": 32
    }  # fmt: skip

    def score(self, tokens: Candidates) -> torch.Tensor:
        m = tokens.moments
        has = (m.count > 0)[:, None, None, None]
        step = torch.einsum("rhkv,rhtk->rhtv", m.covariance, tokens.keys) * tokens.scale
        if tokens.softcap:
            logits = (tokens.keys @ m.mean_key.unsqueeze(-1)) * tokens.scale
            step = step * slope(logits, tokens.softcap)
        predicted = m.mean_value.unsqueeze(2) + step
        residual = tokens.values - torch.where(has, predicted, 0.0)
        raw = tokens.attention * residual.norm(dim=-1)
        num = raw.shape[-1] // POOL * POOL
        pooled = raw.clone()
        pooled[..., :num] = raw[..., :num].unflatten(-1, (-1, POOL)).mean(-1).repeat_interleave(POOL, dim=-1)
        return torch.where(has[..., 0], raw, pooled)
