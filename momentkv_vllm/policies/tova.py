"""TOVA: attention of the newest query (Oren et al., arXiv 2401.06104)."""

import torch

from momentkv_vllm.policies.base import Candidates, Policy


class TOVA(Policy):
    """score_j = attention that the last query before the event gives to token j.

    The original averages over all heads of a layer; here every KV head decides by its own query heads, because tensor
    parallel workers see only their share of the heads and must not answer differently.
    """

    name = "tova"
    needs_attention = True

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention.clone()
