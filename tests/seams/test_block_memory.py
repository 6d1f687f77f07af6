"""Patches of what vLLM's CPU worker takes a block of the pool for. Each test fails on vLLM's own function."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from momentkv_vllm.vllm_seams.registry import register_seams

BLOCKS, PAGES, HEADS, PAGE, WIDTH = 5, 4, 2, 16, 8


@pytest.fixture(scope="module", autouse=True)
def patched():
    register_seams()


def test_copies_are_of_whole_blocks_whatever_view_comes_first():
    """A state's view begins where a page begins and is narrower; every block of the pool is one of theirs."""
    pool = torch.arange(float(2 * BLOCKS * 10)).view(2, BLOCKS, 10)[0]  # of the first of two layers
    state, pages = pool[:, :3], pool.view(BLOCKS * 2, 5)
    gpu_model_runner.copy_kv_cache_blocks_inplace([state, pages], BLOCKS, [(1, 4), (2, 3)])
    assert pool.tolist() == [[*range(10 * row, 10 * row + 10)] for row in (0, 1, 2, 2, 1)]


def runner(pages_per_block):
    """What `_zero_block_ids` reads of a model runner: one group of a layer that attends."""
    spec = FullAttentionSpec(
        block_size=PAGE * pages_per_block, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.float32
    )
    cache = torch.ones(BLOCKS * pages_per_block, HEADS, PAGE, WIDTH)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group], num_blocks=BLOCKS),
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(kv_cache=cache)}),
    ), cache


@pytest.mark.parametrize("pages", [1, PAGES])
def test_fresh_blocks_are_zeroed_and_no_others(pages):
    worker, cache = runner(pages)
    CPUModelRunner._zero_block_ids(worker, [1, 3])
    assert cache.view(BLOCKS, -1).amax(1).tolist() == cache.view(BLOCKS, -1).amin(1).tolist() == [1, 0, 1, 0, 1]
