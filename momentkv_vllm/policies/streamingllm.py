"""StreamingLLM: sinks and a sliding window."""

import torch

from momentkv_vllm.policies.base import Candidates, Policy


class StreamingLLM(Policy):
    """Keeps the first page (it holds the sinks) and the newest tokens (Xiao et al., arXiv 2309.17453).

    The page schedule already says so (`keeps_only_sinks`): no retired token ever enters the store.
    """

    name = "streamingllm"
    source = "arXiv 2309.17453"
    summary = "sinks and window only"
    reads = ("order",)
    defaults = {"correction": "off"}
    keeps_only_sinks = True

    def score(self, tokens: Candidates) -> torch.Tensor:
        in_store = torch.arange(tokens.valid.shape[1], device=tokens.keys.device) < tokens.store_tokens
        return in_store.to(tokens.keys.dtype).expand(tokens.keys.shape[:3]).clone()
