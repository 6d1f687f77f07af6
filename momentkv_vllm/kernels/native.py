"""What the families in C++, CUDA and Triton leave to PyTorch: scores of policies that they do not know, statistics of logits."""

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import RetireWork, fresh_pages
from momentkv_vllm.policies.base import Policy


def given_score(
    cache: CacheView, observed: torch.Tensor | None, work: RetireWork, policy: Policy, scale: float
) -> torch.Tensor | None:
    """The candidates' scores [rows, heads, candidates] float32, from float32 copies of them; None for the default's, which
    kernels compute in place."""
    if policy.is_moment_distance:
        return None
    return policy.score(reference.candidates(cache, observed, work, scale)).contiguous()


def mass_to_clear(cache: CacheView, observed: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor | None:
    """The observed attention that a kernel's `write` clears on fresh pages; statistics of logits are cleared here."""
    if observed is None or observed.dim() == 3:
        return observed
    observed[fresh_pages(slots, cache.page_size)] = 0.0
    return None
