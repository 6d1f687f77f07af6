"""Budgets of heads in caches that are there: where the tiles of head_budgets.py lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

from momentkv_vllm.head_budgets import HeadBudgets, Sizes, budgets, tiles_of
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed


def budgets_in(
    caches: Sequence[CacheView],
    observed: Sequence[Observed | None],
    capacity: Tensor,
    store_tokens: int,
    equal_tokens: int,
) -> list[HeadBudgets]:
    """What kernels are told of every layer, on its device.

    Args:
        caches, observed: of each layer, all of one shape; None: nothing is observed.
        capacity: [layers, heads] tokens of a full store, of `shared`.
        store_tokens: an equal share.
        equal_tokens: of `equal_until`.
    """
    packed, places = caches[0].packed, zip(caches, observed, strict=True)
    addresses = torch.tensor([[cache.kv.data_ptr(), seen.data.data_ptr() if seen else 0] for cache, seen in places])
    sizes = Sizes(packed.raw.stride(1), caches[0].page_slots, packed.layout.tile_bytes)
    held = budgets(capacity, tiles_of(capacity, store_tokens, packed.page_tiles), addresses, sizes, equal_tokens)
    return [heads.to(cache.kv.device) for heads, cache in zip(held, caches, strict=True)]
