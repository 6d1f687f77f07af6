"""Two patches of vLLM's CPU worker for models whose layers that keep states share a pool with those that attend (ledger:
vllm_seams/__init__.py). Both concern what a block of the pool is in the view of a layer (vLLM 0.32.0).

* A fresh block is zeroed by its number, in the views of layers that attend. Where these are of several pages to a block, that
  number is a page's, of another block: somebody's tokens (CPUModelRunner._zero_block_ids).
* A block is copied once per address. The view of a state begins where a page begins and is narrower: when it comes first, only
  so much of the page is copied (vllm/v1/worker/utils.py, copy_kv_cache_blocks_inplace).
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def patch_block_memory() -> None:
    """Install both; calling it again does nothing."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(gpu_model_runner.copy_kv_cache_blocks_inplace, "_momentkv_patched", False):
        return
    copy, zero = gpu_model_runner.copy_kv_cache_blocks_inplace, CPUModelRunner._zero_block_ids

    @functools.wraps(copy)
    def copy_widest_first(caches: Iterable[torch.Tensor], num_blocks: int, copies: Sequence[Any]) -> None:
        if copies:
            copy(sorted(caches, key=lambda cache: -cache.nbytes), num_blocks, copies)

    @functools.wraps(zero)
    def zero_pages_of_blocks(self: Any, block_ids: list[int]) -> None:
        zero(self, _pages_of(block_ids, _pages_per_block(self)))

    copy_widest_first._momentkv_patched = True
    gpu_model_runner.copy_kv_cache_blocks_inplace = copy_widest_first
    CPUModelRunner._zero_block_ids = zero_pages_of_blocks


def _pages_per_block(runner: Any) -> int:
    """Of the layers that attend: those that vLLM zeroes are all in one group, or have blocks of one page."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = [g for g in runner.kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, FullAttentionSpec)]
    layers = runner.compilation_config.static_forward_context
    pages = {layers[name].kv_cache.shape[0] for group in groups for name in group.layer_names if name in layers}
    assert len(pages) <= 1, f"layers that attend have {pages} pages in blocks of one number"
    return pages.pop() // runner.kv_cache_config.num_blocks if pages else 1


def _pages_of(block_ids: list[int], pages: int) -> list[int]:
    return [block * pages + page for block in block_ids for page in range(pages)]
