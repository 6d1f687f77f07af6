"""What the families in C++, CUDA and Triton leave to PyTorch: scores of policies that they do not know, statistics of logits."""

import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import RetireWork, fresh_pages
from momentkv_vllm.policies.base import Policy


def given_score(
    cache: CacheView, slot_mass: torch.Tensor | None, work: RetireWork, policy: Policy, scale: float
) -> torch.Tensor | None:
    """The candidates' scores [rows, heads, candidates] float32, from float32 copies of them; None for the default's, which
    kernels compute in place."""
    if policy.native == "moment_distance":
        return None
    return policy.score(reference.candidates(cache, slot_mass, work, scale)).contiguous()


def mass_to_move(slot_mass: torch.Tensor | None, policy: Policy) -> torch.Tensor | None:
    """The observed attention that a kernel's `consolidate` moves with the tokens that stay; statistics of logits do not move."""
    return None if slot_mass is None or policy.observes.what == "logits" else slot_mass


def mass_to_clear(cache: CacheView, slot_mass: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor | None:
    """The observed attention that a kernel's `store` clears on fresh pages; statistics of logits are cleared here."""
    if slot_mass is None or slot_mass.dim() == 3:
        return slot_mass
    slot_mass[fresh_pages(slots, cache.page_size)] = 0.0
    return None
