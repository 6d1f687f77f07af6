"""Capped logits in every kernel family: against plain softmax, against the reference, and what is not capped."""

import math

import pytest
import torch
from kernel_cases import (
    HEADS,
    attend_work,
    attends_and_observes_like_the_reference,
    poisoned_cache,
    run_attend,
    serving_batch,
)
from test_packed_kernels import play

from momentkv_vllm import moments
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView

reference = select("reference")


def capped(logits, cap):
    return cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_capped_attention_and_a_record_of_one_key_equal_softmax(kernels, cap):
    """Logits of up to some 60: far beyond one cap, bent by the other. With one key evicted often the correction is exact."""
    d, page_size, tokens, gone, scale = 32, 16, 30, 50, 1.5
    generator = torch.Generator().manual_seed(1)
    cache = poisoned_cache(8, page_size, d, torch.float32, moment_dtype="float32")
    cache.softcap = cap
    keys, values = (torch.randn(HEADS, 2 * page_size, d, generator=generator) for _ in range(2))
    for page, part in ((1, slice(0, 16)), (2, slice(16, 32))):
        cache.keys[page], cache.values[page] = keys[:, part], values[:, part]
    lost_key = torch.randn(HEADS, 1, d, generator=generator).expand(HEADS, gone, d)
    lost_value = torch.randn(HEADS, gone, d, generator=generator)
    moment_pages = torch.tensor([[3, 5, 6]])
    cache.write_moments(
        moment_pages, moments.of_tokens(lost_key[None], lost_value[None], torch.ones(1, HEADS, gone), True)
    )
    query = torch.randn(2, 3 * HEADS, d, generator=generator)
    for queries in (1, 2):
        work = attend_work(torch.tensor([[1, 2]]), [tokens - queries], [queries], moment_pages, float(gone))
        output, lse = run_attend(kernels, cache, query[:queries], work, scale, True)
        for i in range(queries):
            seen = tokens - queries + i + 1
            for h in range(3 * HEADS):
                k = torch.cat([keys[h // 3, :seen], lost_key[h // 3]]).double()
                v = torch.cat([values[h // 3, :seen], lost_value[h // 3]]).double()
                logits = capped(scale * k @ query[i, h].double(), cap)
                torch.testing.assert_close(output[i, h].double(), logits.softmax(0) @ v, rtol=1e-4, atol=1e-4)
                assert math.isclose(lse[i, h], logits.logsumexp(0), rel_tol=1e-5, abs_tol=2e-5)


@pytest.mark.parametrize(
    "batch", [(torch.bfloat16, 64, "float32", "first", 3), (torch.float32, 32, "float32", "zeroth", 8)]
)
def test_capped_attend_and_observe_agree_with_the_reference(kernels, batch):
    cache, work, query = serving_batch(*batch)
    cache.softcap = 1.5
    output = attends_and_observes_like_the_reference(kernels, cache, work, query, True)
    cache.softcap = 0.0
    free, _ = run_attend(kernels, cache, query, work, query.shape[-1] ** -0.5, True)
    assert (free - output).abs().max() > 0.1, "the cap was meant to matter"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_store_is_capped_too(kernels, monkeypatch, dtype):
    make = CacheView.of_vllm_cpu
    monkeypatch.setattr(CacheView, "of_vllm_cpu", lambda *given: make(*given, softcap=0.7))
    given = dtype, 8, "h2o", 2, 64, 16
    got, want = (play(family, *given, total=10 * 16, every=16) for family in (kernels.name, "reference"))
    for (output, lse), (want_output, want_lse) in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(output, want_output, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
    assert want[3] > 0, "tokens were meant to be evicted"
