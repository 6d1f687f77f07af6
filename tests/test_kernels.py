"""The reference kernels: attention against plain softmax, consolidation against a token-by-token model."""

import math

import pytest
import torch

from momentkv_vllm.kernels import reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import POLICIES

HEADS = 2


def poisoned_cache(pages, page_size, head_dim, dtype, **record):
    kv = torch.full((pages, HEADS, page_size, 2 * head_dim), math.nan, dtype=dtype)
    return CacheView.of_vllm_cpu(kv, RecordLayout(head_dim, **record))


def attend_work(pages, last, moment_pages=None, count=0.0):
    rows, queries = last.shape
    tokens = torch.arange(rows * queries).view(rows, queries)
    moment_pages = torch.zeros(rows, 0, dtype=torch.long) if moment_pages is None else moment_pages
    return AttendWork(
        tokens, torch.ones_like(tokens, dtype=torch.bool), pages, last, moment_pages, torch.full((rows,), count)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "groups", "page_size", "tokens"),
    [(32, 1, 16, 1), (64, 4, 16, 37), (80, 2, 32, 32), (256, 8, 128, 129)],
)
def test_attend_equals_softmax_over_the_pages(dtype, head_dim, groups, page_size, tokens):
    generator = torch.Generator().manual_seed(tokens)
    num_pages = -(-tokens // page_size)
    cache = poisoned_cache(num_pages + 1, page_size, head_dim, dtype)
    keys, values = (torch.randn(HEADS, tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    pages = torch.randperm(num_pages, generator=generator) + 1
    for t in range(tokens):
        cache.keys[pages[t // page_size], :, t % page_size] = keys[:, t]
        cache.values[pages[t // page_size], :, t % page_size] = values[:, t]
    queries = min(3, tokens)
    query = torch.randn(1, queries, HEADS * groups, head_dim, generator=generator)
    last = torch.arange(tokens - queries, tokens)[None]
    scale = head_dim**-0.5
    output, lse = reference.attend(cache, query, attend_work(pages[None], last), scale, False)
    again, _ = reference.attend(cache, query, attend_work(pages[None], last), scale, False)
    assert torch.equal(output, again)
    for i in range(queries):
        seen = slice(0, last[0, i] + 1)
        for h in range(HEADS * groups):
            k, v = keys[h // groups, seen].double(), values[h // groups, seen].double()
            logits = scale * k @ query[0, i, h].double()
            want = torch.softmax(logits, 0) @ v
            assert torch.allclose(output[0, i, h].double(), want, atol=1e-5), (i, h)
            assert math.isclose(lse[0, i, h], torch.logsumexp(logits, 0), rel_tol=1e-5, abs_tol=1e-5)


def test_correction_is_exact_when_the_evicted_keys_are_one_key():
    """Eq. 12 with Jensen's equality: corrected attention over a part equals attention over everything."""
    d, page_size, scale = 32, 16, 0.2
    generator = torch.Generator().manual_seed(0)
    cache = poisoned_cache(8, page_size, d, torch.float32, moment_dtype="float32")
    keys, values = (torch.randn(HEADS, page_size, d, generator=generator) for _ in range(2))
    cache.keys[1], cache.values[1] = keys, values
    gone_key = torch.randn(HEADS, 1, d, generator=generator).expand(HEADS, 50, d)
    gone_value = torch.randn(HEADS, 50, d, generator=generator)
    record = reference.mo.of_tokens(gone_key[None], gone_value[None], torch.ones(1, HEADS, 50), True)
    moment_pages = torch.tensor([[3, 5, 6]])
    cache.write_moments(moment_pages, record)
    query = torch.randn(1, 1, 2 * HEADS, d, generator=generator)
    work = attend_work(torch.tensor([[1]]), torch.tensor([[page_size - 1]]), moment_pages, 50.0)
    output, lse = reference.attend(cache, query, work, scale, True)
    for h in range(2 * HEADS):
        k = torch.cat([keys[h // 2], gone_key[h // 2]])
        v = torch.cat([values[h // 2], gone_value[h // 2]])
        logits = scale * k @ query[0, 0, h]
        assert torch.allclose(output[0, 0, h], torch.softmax(logits, 0) @ v, atol=1e-5)
        assert torch.allclose(lse[0, 0, h], torch.logsumexp(logits, 0), atol=1e-5)


@pytest.mark.parametrize("record_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_records_survive_their_pages(record_dtype, kv_dtype):
    d, page_size = 32, 16
    layout = RecordLayout(d, record_dtype)
    cache = CacheView.of_vllm_cpu(torch.zeros(9, HEADS, page_size, 2 * d, dtype=kv_dtype), layout)
    pages = torch.tensor(
        [
            [7, 2, 4, 1][: layout.pages(page_size, kv_dtype.itemsize)],
            [8, 3, 5, 6][: layout.pages(page_size, kv_dtype.itemsize)],
        ]
    )
    m = reference.mo.of_tokens(torch.randn(2, HEADS, 9, d), torch.randn(2, HEADS, 9, d), torch.ones(2, HEADS, 9), True)
    cache.write_moments(pages, m)
    back = cache.read_moments(pages, m.count)
    assert torch.equal(back.mean_key, m.mean_key) and torch.equal(back.mean_value, m.mean_value)
    assert torch.equal(back.value_spread, m.value_spread)
    assert torch.allclose(back.covariance, m.covariance, rtol=1e-2 if record_dtype == "bfloat16" else 0, atol=1e-6)
    unused = cache.read_moments(pages, torch.tensor([0.0, 9.0]))
    assert not unused.mean_key[0].any() and unused.mean_key[1].any()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_consolidation_keeps_folds_and_loses_nothing(policy):
    """Over many events: store + moments = exactly the tokens retired so far, and the moments are the float64 ones."""
    d, page_size, store_pages, sinks = 32, 16, 2, 4
    layout = RecordLayout(d, "float32")
    moment_count = layout.pages(page_size, 4)
    cache = CacheView.of_vllm_cpu(torch.zeros(64, HEADS, page_size, 2 * d), layout)
    generator = torch.Generator().manual_seed(3)
    store = torch.arange(1, 1 + store_pages)[None]
    moments = torch.arange(10, 10 + moment_count)[None]
    mass = torch.rand(64, HEADS, page_size, generator=generator) if POLICIES[policy].needs_attention else None
    everything_k, everything_v = torch.zeros(HEADS, 0, d), torch.zeros(HEADS, 0, d)

    def fill(page):
        nonlocal everything_k, everything_v
        k, v = (
            torch.randn(HEADS, page_size, d, generator=generator),
            torch.randn(HEADS, page_size, d, generator=generator),
        )
        cache.keys[page], cache.values[page] = k, v
        everything_k, everything_v = torch.cat([everything_k, k], 1), torch.cat([everything_v, v], 1)

    for page in store[0]:
        fill(page)
    first_sinks = cache.keys[1, :, :sinks].clone()
    count = 0
    for event in range(6):
        retiring = torch.arange(30, 30 + (moment_count + 1 if event == 0 else 1))[None]
        for page in retiring[0]:
            fill(page)
        reference.consolidate(
            cache,
            mass,
            RetireWork(store, retiring, moments, torch.tensor([float(count)])),
            POLICIES[policy](),
            sinks,
            0.2,
        )
        count += retiring.shape[1] * page_size
        kept_k, kept_v = (x[0] for x in cache.read_tokens(store))
        assert torch.equal(cache.keys[1, :, :sinks], first_sinks)
        record = cache.read_moments(moments, torch.tensor([float(count)]))
        for h in range(HEADS):
            same = (everything_k[h][:, None] == kept_k[h][None]).all(-1)
            assert (same.sum(0) == 1).all(), "every slot holds one distinct original token"
            assert torch.equal(everything_v[h][same.int().argmax(0)], kept_v[h]), "keys and values stay together"
            gone_k, gone_v = everything_k[h][~same.any(1)].double(), everything_v[h][~same.any(1)].double()
            assert len(gone_k) == count
            dk, dv = gone_k - gone_k.mean(0), gone_v - gone_v.mean(0)
            assert torch.allclose(record.mean_key[0, h].double(), gone_k.mean(0), atol=1e-5)
            assert torch.allclose(record.covariance[0, h].double(), dv.T @ dk / count, atol=1e-5)
            assert torch.allclose(record.value_spread[0, h].double(), dv.square().sum(-1).mean(), atol=1e-4)


def test_padding_pages_are_never_kept_nor_folded():
    d, page_size = 32, 16
    cache = poisoned_cache(16, page_size, d, torch.float32, moment_dtype="float32")
    for page in (1, 2, 3, 5):
        cache.keys[page], cache.values[page] = torch.randn(HEADS, page_size, d), torch.randn(HEADS, page_size, d)
    moments = torch.tensor([[6, 7, 8], [9, 10, 11]])
    work = RetireWork(torch.tensor([[1], [5]]), torch.tensor([[2, 3], [3, -1]]), moments, torch.zeros(2))
    reference.consolidate(cache, None, work, POLICIES["momentkv"](), 0, 0.2)
    assert not cache.read_tokens(work.store_pages)[0].isnan().any()
    record = cache.read_moments(moments, torch.tensor([32.0, 16.0]))
    assert not record.covariance.isnan().any() and not record.mean_key.isnan().any()


def test_observe_sums_the_attention_of_observed_queries():
    d, page_size = 32, 16
    cache = poisoned_cache(3, page_size, d, torch.float32)
    cache.keys[1:], cache.values[1:] = torch.randn(2, HEADS, page_size, d), torch.randn(2, HEADS, page_size, d)
    last = torch.tensor([[29, 30, 31]])
    work = attend_work(torch.tensor([[2, 1]]), last)
    work.observed, work.restart = torch.tensor([[False, True, True]]), torch.tensor([True])
    query = torch.randn(1, 3, HEADS * 2, d)
    _, lse = reference.attend(cache, query, work, 0.2, False)
    mass = torch.full((3, HEADS, page_size), 7.0)
    reference.observe(cache, mass, query, lse, work, 0.2)
    assert torch.allclose(mass[1:].sum((0, 2)), torch.full((HEADS,), 4.0), atol=1e-4), (
        "2 queries x 2 heads, mass 1 each"
    )
    assert torch.equal(mass[0], torch.full((HEADS, page_size), 7.0)), "pages of others are not touched"
    assert mass[1, :, -1].gt(0).all()
