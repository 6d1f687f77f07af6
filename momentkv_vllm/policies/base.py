"""What an eviction policy is: one score per candidate token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from momentkv_vllm.moments import Moments


@dataclass
class Candidates:
    """Tokens competing for the store at one event; rows are (request) x (KV head), all tensors float32.

    keys, values: [rows, heads, tokens, head_dim], store slots first, then the retiring tokens in order.
    valid:        [rows, tokens] False for padding (rows retire different numbers of tokens).
    store_tokens: how many of the tokens are store slots.
    moments:      the running moments before this event; `moments.count` is 0 for a sequence's first event.
    attention:    [rows, heads, tokens] attention mass observed so far, None unless `needs_attention`; with `observes_logits`
                  [rows, heads, tokens, 3]: count, sum and sum of squares of the logits.
    scale:        softmax scale of the layer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    store_tokens: int
    moments: Moments
    attention: torch.Tensor | None
    scale: float


class Policy(ABC):
    """An eviction policy: stateless, one instance per layer; what it needs is declared, what it does is `score`."""

    name: str
    needs_means: bool = False
    """The score reads the mean key or value (so a record is kept even with correction off)."""
    needs_covariance: bool = False
    needs_attention: bool = False
    """The score reads the attention of the last `observation_tokens` queries before the event."""
    observes_all_queries: bool = False
    """That attention sums over all queries since the sequence's start instead; it moves with the tokens."""
    observes_logits: bool = False
    """The statistics of the logits are observed instead of their softmax (in PyTorch: no C++ kernel has them)."""
    is_moment_distance: bool = False
    """The score is that of policies/momentkv.py, which kernels may compute in place."""
    keeps_only_sinks: bool = False
    """Never keeps a retired token: the page schedule turns the store into window (StreamingLLM)."""

    @abstractmethod
    def score(self, tokens: Candidates) -> torch.Tensor:
        """Importance of every candidate, [rows, heads, tokens]; higher = keep. Sinks are protected by the caller."""
