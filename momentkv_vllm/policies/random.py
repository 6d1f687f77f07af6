"""Random eviction: the baseline that any score must beat."""

import torch

from momentkv_vllm.policies.base import AS_PUBLISHED, Candidates, Policy

_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


class Random(Policy):
    """Keeps a uniform sample of everything seen so far, the same for every run, batch and schedule.

    Pseudo-random numbers are a function of (count, head, candidate). A token that has survived N tokens in a store of S is
    known to be among the S best: it draws from the upper S / N of the unit interval, a retiring token from all of it.
    (Fresh draws for all would favour recent tokens.)
    """

    name = "random"
    summary = "fixed pseudo-random priority: a uniform sample of the past"
    reads = ("order", "head")
    defaults = AS_PUBLISHED | {"correction": "off", "window_tokens": 16}

    def score(self, tokens: Candidates) -> torch.Tensor:
        rows, heads, num, _ = tokens.keys.shape
        count = tokens.moments.count
        draw = self._uniform(count.long()[:, None, None], heads, num)
        share = (tokens.store_tokens / (count + tokens.store_tokens))[:, None, None]
        in_store = torch.arange(num, device=draw.device) < tokens.store_tokens
        return torch.where(in_store, 1 - share * (1 - draw), draw)

    @staticmethod
    def _uniform(seed: torch.Tensor, heads: int, num: int) -> torch.Tensor:
        """[rows, heads, num] numbers in [0, 1), by splitmix64's finalizer."""
        head = torch.arange(heads, device=seed.device)[:, None]
        place = torch.arange(num, device=seed.device)
        x = ((seed * 4096 + head) * 1_048_576 + place + 1) * _MIX
        x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - (1 << 64))
        x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - (1 << 64))
        return (x >> 40 & 0xFFFFFF).float() / (1 << 24)
