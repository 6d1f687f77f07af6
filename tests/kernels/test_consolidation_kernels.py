"""Consolidation and records of every kernel family: against a token-by-token model and against the reference on odd sizes."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import HEADS, WIDEST, observed, poisoned_cache

from momentkv_vllm import moments
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import RetireWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find, names


@pytest.mark.parametrize("record_dtype", ["int8", "bfloat16", "float32"])
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
    m = moments.of_tokens(torch.randn(2, HEADS, 9, d), torch.randn(2, HEADS, 9, d), torch.ones(2, HEADS, 9), True)
    cache.write_moments(pages, m)
    back = cache.read_moments(pages, m.count)
    assert torch.equal(back.mean_key, m.mean_key) and torch.equal(back.mean_value, m.mean_value)
    assert torch.equal(back.value_spread, m.value_spread)
    relative = {"int8": 0.0, "bfloat16": 2**-8, "float32": 0.0}[record_dtype]
    # int8: half a step of the row's scale.
    absolute = m.covariance.abs().amax(-1, keepdim=True) / 253 if record_dtype == "int8" else torch.tensor(1e-9)
    assert ((back.covariance - m.covariance).abs() <= relative * m.covariance.abs() + absolute).all()
    unused = cache.read_moments(pages, torch.tensor([0.0, 9.0]))
    assert not unused.mean_key[0].any() and unused.mean_key[1].any()


@pytest.mark.parametrize("policy", sorted(names()))
def test_consolidation_keeps_folds_and_loses_nothing(kernels, policy):
    """Over many events: store + moments = exactly the tokens retired so far, and the moments are the float64 ones."""
    d, page_size, store_pages, sinks = 32, 16, 2, 4
    layout = RecordLayout(d, "float32")
    moment_count = layout.pages(page_size, 4)
    cache = CacheView.of_vllm_cpu(torch.zeros(64, HEADS, page_size, 2 * d), layout)
    generator = torch.Generator().manual_seed(3)
    store = torch.arange(1, 1 + store_pages)[None]
    moment_pages = torch.arange(10, 10 + moment_count)[None]
    mass = observed(policy, (64, HEADS, page_size), generator)
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
        kernels.consolidate(
            cache,
            mass,
            RetireWork(store, retiring, moment_pages, torch.tensor([float(count)])),
            find(policy)(),
            sinks,
            0.2,
        )
        count += retiring.shape[1] * page_size
        kept_k, kept_v = (x[0] for x in cache.read_tokens(store))
        assert torch.equal(cache.keys[1, :, :sinks], first_sinks)
        record = cache.read_moments(moment_pages, torch.tensor([float(count)]))
        for h in range(HEADS):
            same = (everything_k[h][:, None] == kept_k[h][None]).all(-1)
            assert (same.sum(0) == 1).all(), "every slot holds one distinct original token"
            assert torch.equal(everything_v[h][same.int().argmax(0)], kept_v[h]), "keys and values stay together"
            gone_k, gone_v = everything_k[h][~same.any(1)].double(), everything_v[h][~same.any(1)].double()
            assert len(gone_k) == count
            dk, dv = gone_k - gone_k.mean(0), gone_v - gone_v.mean(0)
            assert torch.allclose(record.mean_key[0, h].double(), gone_k.mean(0), atol=1e-5)
            assert torch.allclose(record.covariance[0, h].double(), dk.T @ dv / count, atol=1e-5)
            assert torch.allclose(record.value_spread[0, h].double(), dv.square().sum(-1).mean(), atol=1e-4)


@pytest.mark.parametrize("policy", sorted(names()))
@pytest.mark.parametrize(
    ("dtype", "head_dim", "moment_dtype"),
    [
        (torch.bfloat16, 128, "bfloat16"),
        (torch.float16, 80, "float32"),
        (torch.float32, 32, "bfloat16"),
        (torch.bfloat16, 64, "int8"),
        *[(torch.bfloat16, d, "bfloat16") for d in WIDEST],
    ],
)
def test_consolidation_agrees_with_the_reference(kernels, policy, dtype, head_dim, moment_dtype):
    """First events (whose moment pages are among the retiring ones), later events, and rows that retire fewer pages."""
    page_size, store_pages = 16, 3
    record = RecordLayout(head_dim, moment_dtype)
    num_moments = record.pages(page_size, dtype.itemsize)
    retire = num_moments + 5
    generator = torch.Generator().manual_seed(head_dim)
    rows = 3
    pages = (torch.randperm(rows * (store_pages + retire), generator=generator) + 1).view(rows, -1)
    store, retiring = pages[:, :store_pages].contiguous(), pages[:, store_pages:].contiguous()
    cache = poisoned_cache(rows * (store_pages + retire) + 1, page_size, head_dim, dtype)
    cache.record_layout = record
    cache.kv[1:] = torch.randn(cache.kv[1:].shape, generator=generator).to(dtype)
    mass = observed(policy, cache.keys.shape[:3], generator)
    counts = torch.tensor([0.0, 0.0, 200.0])
    gone = (torch.randn(rows, HEADS, 40, head_dim, generator=generator) for _ in range(2))
    moment_pages = retiring[:, -num_moments:].contiguous()
    retiring[2, -num_moments:] = -1  # a later event: its record exists
    cache.write_moments(moment_pages[2:], _row(moments.of_tokens(*gone, torch.ones(rows, HEADS, 40), True), 2))
    work = RetireWork(store, retiring, moment_pages, counts)
    twin = CacheView.of_vllm_cpu(cache.kv.clone(), record)
    twin_mass = None if mass is None else replace(mass, data=mass.data.clone())
    select("reference").consolidate(twin, twin_mass, work, find(policy)(), 4, head_dim**-0.5)
    kernels.consolidate(cache, mass, work, find(policy)(), 4, head_dim**-0.5)
    for got, want in zip(cache.read_tokens(store), twin.read_tokens(store), strict=True):
        assert torch.equal(got, want), "the same tokens in the same slots"
    if mass is not None and mass.what == "mass":
        assert torch.equal(mass.data[store], twin_mass.data[store]), "a token's observed attention moves with it"
    after = torch.ones(rows)
    got, want = cache.read_moments(moment_pages, after), twin.read_moments(moment_pages, after)
    rounding = 2**-7 if moment_dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(got.mean_key, want.mean_key, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean_value, want.mean_value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.value_spread, want.value_spread, rtol=1e-4, atol=1e-5)
    step = want.covariance.abs().max().item() / 127 if moment_dtype == "int8" else 0.0
    torch.testing.assert_close(got.covariance, want.covariance, rtol=rounding, atol=1e-4 + step)


def _row(m, row):
    return moments.Moments(
        *(x[row : row + 1] for x in (m.count, m.mean_key, m.mean_value, m.value_spread, m.covariance))
    )


@pytest.mark.parametrize(("head_dim", "pages"), [(32, (1, 2, 1)), (64, (2, 3, 1)), (128, (3, 5, 1)), (256, (5, 9, 1))])
def test_pages_of_a_record(head_dim, pages):
    """int8, bfloat16 and no covariance in bfloat16 pages of 16: what first order costs a sequence."""
    layouts = RecordLayout(head_dim, "int8"), RecordLayout(head_dim), RecordLayout(head_dim, has_covariance=False)
    assert tuple(layout.pages(16, 2) for layout in layouts) == pages


def test_equal_and_undefined_scores(kernels):
    """Of equal scores the earlier token stays; NaN goes first."""
    d, page_size = 32, 16
    cache = poisoned_cache(8, page_size, d, torch.float32, moment_dtype="float32")
    cache.kv[1:3] = 0.0
    cache.values[1], cache.values[2] = 1.0, 2.0
    cache.keys[1, :, 5] = math.nan
    work = RetireWork(torch.tensor([[1]]), torch.tensor([[2]]), torch.tensor([[3, 4, 5]]), torch.tensor([10.0]))
    cache.write_moments(
        work.moment_pages, moments.of_tokens(*torch.randn(2, 1, HEADS, 9, d), torch.ones(1, HEADS, 9), True)
    )
    kernels.consolidate(cache, Observed(torch.zeros(8, HEADS, page_size)), work, find("momentkv")(), 0, 0.2)
    want = torch.ones(page_size)
    want[5] = 2.0
    assert torch.equal(cache.values[1, 0, :, 0], want)


def test_padding_pages_are_never_kept_nor_folded(kernels):
    d, page_size = 32, 16
    cache = poisoned_cache(16, page_size, d, torch.float32, moment_dtype="float32")
    for page in (1, 2, 3, 5):
        cache.keys[page], cache.values[page] = torch.randn(HEADS, page_size, d), torch.randn(HEADS, page_size, d)
    moment_pages = torch.tensor([[6, 7, 8], [9, 10, 11]])
    work = RetireWork(torch.tensor([[1], [5]]), torch.tensor([[2, 3], [3, -1]]), moment_pages, torch.zeros(2))
    kernels.consolidate(cache, Observed(torch.rand(16, HEADS, page_size)), work, find("momentkv")(), 0, 0.2)
    assert not cache.read_tokens(work.store_pages)[0].isnan().any()
    record = cache.read_moments(moment_pages, torch.tensor([32.0, 16.0]))
    assert not record.covariance.isnan().any() and not record.mean_key.isnan().any()
