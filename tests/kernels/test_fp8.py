"""Caches of fp8: written as vLLM's own operator writes them, bit by bit; read, folded and kept with their scales."""

import math

import pytest
import torch
from kernel_cases import HEADS, attends_and_observes_like_the_reference, poisoned_cache, serving_batch
from stored_by_vllm import needs_avx512, stored_by_vllm

from momentkv_vllm import moments
from momentkv_vllm.fp8 import KINDS, truncated
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import RetireWork
from momentkv_vllm.policies import find

NUMBERS = sorted(set(KINDS.values()), key=str)
PAGE = 32
SERVING = ["cpu", "reference"]


@pytest.fixture(params=SERVING)
def kernels(request):
    """Those that serve fp8."""
    return select(request.param)


def awkward_numbers(numbers: torch.dtype) -> torch.Tensor:
    """All numbers of fp8 and their neighbours in float32, what rounds to subnormal ones, and what is no number: [tokens, 2, 64]."""
    exact = torch.arange(256, dtype=torch.uint8).view(numbers).float()
    exact = exact[exact.isfinite()].view(torch.int32)
    near = torch.cat([(exact + step).view(torch.float32) for step in range(-40, 41)])
    wide = torch.randn(1 << 16) * 10 ** torch.linspace(-7, 4, 1 << 16)
    odd = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-40])
    x = torch.cat([near[near.isfinite()], wide, odd])
    return torch.nn.functional.pad(x, (0, -len(x) % (PAGE * 2 * 64))).view(-1, 2, 64)


@needs_avx512
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1.7, 0.0123])
def test_written_as_vllm_writes(kernels, kind, dtype, scale):
    x = awkward_numbers(KINDS[kind]).to(dtype)
    kv = torch.zeros(len(x) // PAGE, 2, PAGE, 128, dtype=KINDS[kind])
    cache = CacheView.of_vllm_cpu(kv, None)
    cache.key_scale, cache.value_scale = scale, 2 * scale
    kernels.write(cache, x, x.clone(), torch.arange(len(x)), None)
    assert torch.equal(cache.raw, stored_by_vllm(x, kind, scale))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_truncated_is_the_next_number_towards_zero(numbers):
    """By counting, above the subnormal numbers, of which those of e4m3 are rounded first."""
    known = torch.arange(128, dtype=torch.uint8).view(numbers).float()
    known = known[known.isfinite()].sort().values
    x = known[8:-1].repeat_interleave(50) * (1 + torch.rand(50 * (len(known) - 9)))
    below = known[torch.searchsorted(known, x, right=True) - 1]
    assert torch.equal(truncated(x, 1.0, numbers).float(), below)
    assert torch.equal(truncated(-x, 1.0, numbers).float(), -below)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "groups"), [(64, 4), (96, 1), (128, 8)])
def test_attend_and_observe_agree_with_the_reference(numbers, dtype, head_dim, groups):
    batch = serving_batch(numbers, head_dim, "bfloat16", "first", groups, page_size=PAGE, query_dtype=dtype)
    cache, work, query = batch
    without = attends_and_observes_like_the_reference(select("cpu"), cache, work, query, True)
    cache.key_scale, cache.value_scale = 0.3, 2.5
    scaled = attends_and_observes_like_the_reference(select("cpu"), cache, work, query, True)
    assert (without - scaled).abs().max() > 0.5, "scales are heard"


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_a_store_of_fp8_moves_bytes_and_moments_are_of_scaled_numbers(kernels, numbers):
    """Tokens that stay keep their bytes, those that go are folded times the scales: by the policy that keeps the newest, so
    that the test knows which."""
    cache = poisoned_cache(12, PAGE, 64, numbers, moment_dtype="float32")
    cache.key_scale, cache.value_scale = 0.3, 2.5
    cache.kv[1:4] = torch.randn(3, HEADS, PAGE, 128).to(numbers)
    before, tokens = cache.raw.clone(), cache.read_tokens(torch.tensor([[1, 2, 3]]))
    assert torch.equal(tokens[0][0, 1, PAGE + 5], cache.keys[2, 1, 5].float() * 0.3)
    moment_pages = torch.arange(4, 4 + cache.record_layout.pages(PAGE, 1))[None]
    work = RetireWork(torch.tensor([[1]]), torch.tensor([[2, 3]]), moment_pages, torch.zeros(1))
    kernels.consolidate(cache, None, work, find("streamingllm")(), 4, 0.125)
    assert torch.equal(cache.raw[1], before[1]), "the store's own tokens stay, byte by byte"
    lost = torch.ones(1, HEADS, 2 * PAGE)
    want = moments.of_tokens(*(x[:, :, PAGE:] for x in tokens), lost, True)
    got = cache.read_moments(moment_pages, torch.full((1,), 2.0 * PAGE))
    torch.testing.assert_close(got.mean_key, want.mean_key, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean_value, want.mean_value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.covariance, want.covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["momentkv", "h2o", "keydiff"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_the_same_tokens_stay(policy, numbers):
    """Byte by byte, in the same slots, as the reference keeps them."""
    generator = torch.Generator().manual_seed(0)
    start = poisoned_cache(12, PAGE, 64, numbers, has_covariance=False)
    start.kv[1:7] = torch.randn(6, HEADS, PAGE, 128, generator=generator).to(numbers)
    seen = torch.rand(12, HEADS, PAGE, generator=generator)
    work = RetireWork(torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]]), torch.tensor([[7]]), torch.zeros(1))
    stores = []
    for family in SERVING:
        cache = CacheView.of_vllm_cpu(start.kv.clone(), start.record_layout)
        cache.key_scale, cache.value_scale = 0.3, 2.5
        mass = Observed(seen.clone()) if find(policy).observes else None
        select(family).consolidate(cache, mass, work, find(policy)(), 4, 0.125)
        stores.append(cache.raw[1:3])
    assert torch.equal(*stores)
    assert not torch.equal(stores[0], start.raw[1:3]), "something must have moved"
