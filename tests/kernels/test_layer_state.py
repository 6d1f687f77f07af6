"""What a layer keeps beside vLLM's KV cache follows the cache."""

import os

import pytest
import torch
from layer_sides import COLUMNS, Side, common_of, config_of, new_cache, new_tokens
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from momentkv_vllm.attention import cpu_backend
from momentkv_vllm.attention.cpu_backend import MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder
from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.plugin import register

CPU = (MomentKVBackend, MomentKVImpl, MomentKVMetadataBuilder)
CUDA = (CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = torch.tensor([[1, 2, 3, 4] + [0] * (COLUMNS - 4)])
"""The block table of a cache of four pages and the null page."""


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    """There are no process groups here."""
    register()
    monkeypatch.setattr(cpu_backend, "get_tensor_model_parallel_rank", lambda: 0)


def live(side, steps):
    """Outputs of the steps of a life, and the observed mass after each, copied; of no page before the first time."""
    generator = torch.Generator().manual_seed(3)
    lens, seen = [0] * len(steps[0]), []
    for new in steps:
        lens = [a + b for a, b in zip(lens, new)]
        output = side.step(common_of(lens, new), *new_tokens(sum(new), generator))
        observed = side.impl.observed
        seen.append((output, observed.data.clone() if observed else torch.zeros(0)))
    return seen


def check_a_cache_replaced(config, classes, first, steps):
    """A layer that has observed in a small cache, as vLLM's to measure CUDA graphs, lives in a larger one as a new layer does."""
    side, fresh = Side(config, *classes), Side(config, *classes)
    large, side.cache = side.cache, new_cache(SMALL)
    side.step(common_of(first, first, SMALL), *new_tokens(sum(first), torch.Generator().manual_seed(4)))
    assert len(side.impl.observed.data) == len(side.cache) == 5
    side.cache = large
    for number, (got, want) in enumerate(zip(live(side, steps), live(fresh, steps), strict=True)):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), number
    assert len(want[1]) == len(large), "something was observed"
    assert fresh.builder.planner.schedules[0].boundary_column(sum(new[0] for new in steps)) > 0


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("policy", ["h2o", "expected_attention"])
def test_observed_attention_follows_the_cache(models, kernels, policy):
    config = config_of(models(), policy=policy, kernels=kernels, observation_tokens=96)
    check_a_cache_replaced(config, CPU, [50], [[60, 90], [50, 20], *[[1, 1]] * 6])


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
def test_a_gpu_layer_answers_in_the_cache_that_replaces_the_profiled_one(models, monkeypatch):
    """Decode steps, all that vLLM runs before the cache has its size."""
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *given: given[7].zero_())
    check_a_cache_replaced(config_of(models()), CUDA, [1], [[96], [1], [1], [20], [1]])


def test_a_cache_that_stays_keeps_its_mass_at_its_address(models):
    """A captured graph holds on to it."""
    side = Side(config_of(models(), policy="h2o"), *CPU)
    live(side, [[60]])
    mass = side.impl.observed.data
    live(side, [[60], [50], [1]])
    assert side.impl.observed.data is mass
