"""Every kernel family on the same cases: attention against plain softmax, consolidation against a token-by-token model,
and each family against the reference on odd sizes, with everything that must not be read poisoned by NaN."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from momentkv_vllm.kernels import dispatch, moments, reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.page_schedule import cdiv
from momentkv_vllm.policies import POLICIES

HEADS = 2


def poisoned_cache(pages, page_size, head_dim, dtype, **record):
    kv = torch.full((pages, HEADS, page_size, 2 * head_dim), math.nan, dtype=dtype)
    return CacheView.of_vllm_cpu(kv, RecordLayout(head_dim, **record))


# Triton needs a GPU or its interpreter, which must be chosen before Triton is imported: test_interpreter.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES = ["cpu", "reference", *["triton"] * INTERPRETED]
LONG = (
    [130, 280] if INTERPRETED else [700, 1400]
)  # a kernel that is interpreted takes a second where it should take 10 us


@pytest.fixture(params=FAMILIES)
def kernels(request):
    return dispatch.select(request.param)


def attend_work(pages, last, queries, moment_pages=None, count=0.0):
    """One work list: row i has `queries[i]` queries, its first one sees slots 0..last[i]."""
    last, queries = torch.tensor(last), torch.tensor(queries)
    moment_pages = torch.zeros(len(last), 0, dtype=torch.long) if moment_pages is None else moment_pages
    first_token = queries.cumsum(0) - queries
    return AttendWork(first_token, queries, pages, last, moment_pages, torch.full((len(last),), count))


def run_attend(kernels, cache, query, work, scale, correct):
    """(output, lse); both start as NaN, the query is in the cache's dtype."""
    query = query.to(cache.kv.dtype)
    output = torch.full_like(query, math.nan)
    lse = torch.full(query.shape[:2], math.nan)
    kernels.attend(cache, query, output, lse, work, scale, correct)
    return output, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "groups", "page_size", "tokens"),
    [(32, 1, 16, 1), (64, 4, 16, 37), (80, 2, 32, 32), (256, 8, 128, 129)],
)
def test_attend_equals_softmax_over_the_pages(kernels, dtype, head_dim, groups, page_size, tokens):
    generator = torch.Generator().manual_seed(tokens)
    num_pages = -(-tokens // page_size)
    cache = poisoned_cache(num_pages + 1, page_size, head_dim, dtype)
    keys, values = (torch.randn(HEADS, tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    pages = torch.randperm(num_pages, generator=generator) + 1
    for t in range(tokens):
        cache.keys[pages[t // page_size], :, t % page_size] = keys[:, t]
        cache.values[pages[t // page_size], :, t % page_size] = values[:, t]
    queries = min(3, tokens)
    query = torch.randn(queries, HEADS * groups, head_dim, generator=generator).to(dtype)
    work = attend_work(pages[None], [tokens - queries], [queries])
    scale = head_dim**-0.5
    output, lse = run_attend(kernels, cache, query, work, scale, False)
    again, _ = run_attend(kernels, cache, query, work, scale, False)
    assert torch.equal(output, again)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}[dtype]
    for i in range(queries):
        seen = slice(0, tokens - queries + i + 1)
        for h in range(HEADS * groups):
            k, v = keys[h // groups, seen].double(), values[h // groups, seen].double()
            logits = scale * k @ query[i, h].double()
            want = torch.softmax(logits, 0) @ v
            assert torch.allclose(output[i, h].double(), want, rtol=rounding, atol=1e-5), (i, h)
            assert math.isclose(lse[i, h], torch.logsumexp(logits, 0), rel_tol=1e-5, abs_tol=1e-5)


def test_correction_is_exact_when_the_evicted_keys_are_one_key(kernels):
    """Eq. 12 with Jensen's equality: corrected attention over a part equals attention over everything."""
    d, page_size, scale = 32, 16, 0.2
    generator = torch.Generator().manual_seed(0)
    cache = poisoned_cache(8, page_size, d, torch.float32, moment_dtype="float32")
    keys, values = (torch.randn(HEADS, page_size, d, generator=generator) for _ in range(2))
    cache.keys[1], cache.values[1] = keys, values
    gone_key = torch.randn(HEADS, 1, d, generator=generator).expand(HEADS, 50, d)
    gone_value = torch.randn(HEADS, 50, d, generator=generator)
    record = moments.of_tokens(gone_key[None], gone_value[None], torch.ones(1, HEADS, 50), True)
    moment_pages = torch.tensor([[3, 5, 6]])
    cache.write_moments(moment_pages, record)
    query = torch.randn(1, 2 * HEADS, d, generator=generator)
    work = attend_work(torch.tensor([[1]]), [page_size - 1], [1], moment_pages, 50.0)
    output, lse = run_attend(kernels, cache, query, work, scale, True)
    for h in range(2 * HEADS):
        k = torch.cat([keys[h // 2], gone_key[h // 2]])
        v = torch.cat([values[h // 2], gone_value[h // 2]])
        logits = scale * k @ query[0, h]
        assert torch.allclose(output[0, h], torch.softmax(logits, 0) @ v, atol=1e-5)
        assert torch.allclose(lse[0, h], torch.logsumexp(logits, 0), atol=1e-5)


def serving_batch(dtype, head_dim, moment_dtype, correction, groups, page_size=16, seed=0):
    """A cache and a work list of odd rows: decode at a page's first and last slot, chunks, rows with and without a record.

    Everything that a row does not own or has not written is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    has_covariance = correction == "first"
    record = RecordLayout(head_dim, moment_dtype, True, has_covariance)
    num_moments = record.pages(page_size, dtype.itemsize)
    last, queries, counts = [0, 15, 16, *LONG, 40, 30], [1, 1, 1, 1, 1, 7, 33], [0, 32, 0, 48, 500, 64, 0]
    num_pages = -(-(max(last) + max(queries)) // page_size)
    cache = poisoned_cache(
        1 + len(last) * (num_pages + num_moments), page_size, head_dim, dtype, moment_dtype=moment_dtype
    )
    cache.record = record
    order = torch.randperm(len(cache.kv) - 1, generator=generator) + 1
    pages, moment_pages = order.view(len(last), -1).split([num_pages, num_moments], 1)
    pages = pages.clone()
    for row in range(len(last)):
        slots = last[row] + queries[row]
        used = -(-slots // page_size)
        pages[row, used:] = 0
        for head in range(HEADS):
            k, v = (torch.randn(used * page_size, head_dim, generator=generator) for _ in range(2))
            k[slots:], v[slots:] = math.nan, math.nan
            cache.keys[pages[row, :used], head] = k.view(used, page_size, -1).to(dtype)
            cache.values[pages[row, :used], head] = v.view(used, page_size, -1).to(dtype)
    gone = (torch.randn(len(last), HEADS, 64, head_dim, generator=generator) for _ in range(2))
    weight = torch.ones(len(last), HEADS, 64)
    cache.write_moments(moment_pages, moments.of_tokens(*gone, weight, has_covariance))
    work = attend_work(pages, last, queries, moment_pages.contiguous())
    work.count = torch.tensor(counts, dtype=torch.float32)
    work.observe_from = torch.tensor([0, 1, 0, 0, 1, 3, 33])
    work.restart = torch.tensor([True, False] * 4)[: len(last)]
    query = 2 * torch.randn(sum(queries), HEADS * groups, head_dim, generator=generator)
    return cache, work, query.to(dtype)


BATCHES = [
    (torch.bfloat16, 128, "bfloat16", "first", 4),
    (torch.bfloat16, 64, "float32", "first", 3),
    (torch.float16, 80, "bfloat16", "first", 7),
    (torch.float32, 32, "float32", "first", 1),
    (torch.float32, 256, "bfloat16", "zeroth", 16),
    (torch.bfloat16, 128, "int8", "first", 8),
    (torch.float16, 80, "int8", "first", 2),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"{b[0]}-d{b[1]}-{b[2]}-{b[3]}-g{b[4]}")
@pytest.mark.parametrize("correct", [False, True])
def test_attend_and_observe_agree_with_the_reference(kernels, batch, correct):
    cache, work, query = serving_batch(*batch)
    scale = query.shape[-1] ** -0.5
    want, want_lse = run_attend(reference, cache, query, work, scale, correct)
    output, lse = run_attend(kernels, cache, query, work, scale, correct)
    again, _ = run_attend(kernels, cache, query, work, scale, correct)
    assert torch.equal(output, again)
    assert not output.isnan().any()
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[query.dtype]
    torch.testing.assert_close(output, want, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    want_mass, mass = (torch.full(cache.keys.shape[:3], 7.0) for _ in range(2))
    reference.observe(cache, want_mass, query, want_lse, work, scale)
    kernels.observe(cache, mass, query, want_lse, work, scale)
    used = torch.cat([row[row > 0] for row in work.pages])
    torch.testing.assert_close(mass[used], want_mass[used], rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(kernels):
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    together, _ = run_attend(kernels, cache, query, work, 0.125, True)
    for row in range(len(work.last)):
        alone = AttendWork(*(getattr(work, f)[row : row + 1] for f in list(AttendWork.__dataclass_fields__)[:6]))
        output, _ = run_attend(kernels, cache, query, alone, 0.125, True)
        tokens = slice(int(alone.first_token), int(alone.first_token) + int(alone.queries))
        if kernels is reference:  # torch's matrix products are not the same for every shape
            torch.testing.assert_close(output[tokens], together[tokens], rtol=2**-7, atol=1e-5)
        else:
            assert torch.equal(output[tokens], together[tokens]), row


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(kernels, threads):
    if kernels is reference:
        pytest.skip("torch's own matrix products")
    cache, work, query = serving_batch(torch.bfloat16, 128, "bfloat16", "first", 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        want, _ = run_attend(kernels, cache, query, work, 0.1, True)
        torch.set_num_threads(threads)
        output, _ = run_attend(kernels, cache, query, work, 0.1, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(output, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_writes_tokens_and_clears_fresh_pages(kernels, dtype):
    cache = poisoned_cache(4, 16, 64, dtype)
    packed = torch.randn(21, HEADS * 3, 64).to(dtype)  # as in a model: q, k and v of a token side by side
    key, value = packed[:, HEADS : 2 * HEADS], packed[:, 2 * HEADS :]
    slots = torch.tensor([*range(28, 32), *range(48, 64), -1])  # a page's end, a fresh page, padding
    mass = torch.full(cache.keys.shape[:3], 5.0)
    before = cache.kv.clone()
    kernels.store(cache, key, value, slots, mass)
    for i, slot in enumerate(slots[:-1].tolist()):
        assert torch.equal(cache.keys[slot // 16, :, slot % 16], key[i])
        assert torch.equal(cache.values[slot // 16, :, slot % 16], value[i])
    for untouched in (0, 2):
        assert torch.equal(cache.kv[untouched].view(torch.uint8), before[untouched].view(torch.uint8))
    assert cache.keys[1, :, :12].isnan().all() and not mass[3].any() and mass[1].eq(5).all()
    kernels.store(cache, key[:1], value[:1], torch.tensor([32]), None)
    assert (
        torch.equal(cache.keys[2, :, 0], key[0]) and not cache.keys[2, :, 1:].any() and not cache.values[2, :, 1:].any()
    )


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


def observed(policy, shape, generator):
    """What a policy may have observed of every slot; None if it observes nothing."""
    if not POLICIES[policy].needs_attention:
        return None
    return torch.rand(*shape, *[3] * POLICIES[policy].observes_logits, generator=generator)


@pytest.mark.parametrize("policy", sorted(POLICIES))
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
            POLICIES[policy](),
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


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(
    ("dtype", "head_dim", "moment_dtype"),
    [
        (torch.bfloat16, 128, "bfloat16"),
        (torch.float16, 80, "float32"),
        (torch.float32, 32, "bfloat16"),
        (torch.bfloat16, 64, "int8"),
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
    cache.record = record
    cache.kv[1:] = torch.randn(cache.kv[1:].shape, generator=generator).to(dtype)
    mass = observed(policy, cache.keys.shape[:3], generator)
    counts = torch.tensor([0.0, 0.0, 200.0])
    gone = (torch.randn(rows, HEADS, 40, head_dim, generator=generator) for _ in range(2))
    moment_pages = retiring[:, -num_moments:].contiguous()
    retiring[2, -num_moments:] = -1  # a later event: its record exists
    cache.write_moments(moment_pages[2:], _row(moments.of_tokens(*gone, torch.ones(rows, HEADS, 40), True), 2))
    work = RetireWork(store, retiring, moment_pages, counts)
    twin = CacheView.of_vllm_cpu(cache.kv.clone(), record)
    twin_mass = None if mass is None else mass.clone()
    reference.consolidate(twin, twin_mass, work, POLICIES[policy](), 4, head_dim**-0.5)
    kernels.consolidate(cache, mass, work, POLICIES[policy](), 4, head_dim**-0.5)
    for got, want in zip(cache.read_tokens(store), twin.read_tokens(store), strict=True):
        assert torch.equal(got, want), "the same tokens in the same slots"
    if mass is not None and not POLICIES[policy].observes_logits:
        assert torch.equal(mass[store], twin_mass[store]), "a token's observed attention moves with it"
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
    kernels.consolidate(cache, torch.zeros(8, HEADS, page_size), work, POLICIES["momentkv"](), 0, 0.2)
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
    kernels.consolidate(cache, torch.rand(16, HEADS, page_size), work, POLICIES["momentkv"](), 0, 0.2)
    assert not cache.read_tokens(work.store_pages)[0].isnan().any()
    record = cache.read_moments(moment_pages, torch.tensor([32.0, 16.0]))
    assert not record.covariance.isnan().any() and not record.mean_key.isnan().any()


def test_observe_sums_the_attention_of_observed_queries(kernels):
    d, page_size = 32, 16
    cache = poisoned_cache(3, page_size, d, torch.float32)
    cache.keys[1:], cache.values[1:] = torch.randn(2, HEADS, page_size, d), torch.randn(2, HEADS, page_size, d)
    work = attend_work(torch.tensor([[2, 1]]), [29], [3])
    work.observe_from, work.restart = torch.tensor([1]), torch.tensor([True])
    query = torch.randn(3, HEADS * 2, d)
    _, lse = run_attend(kernels, cache, query, work, 0.2, False)
    mass = torch.full((3, HEADS, page_size), 7.0)
    kernels.observe(cache, mass, query, lse, work, 0.2)
    assert torch.allclose(mass[1:].sum((0, 2)), torch.full((HEADS,), 4.0), atol=1e-4), (
        "2 queries x 2 heads, mass 1 each"
    )
    assert torch.equal(mass[0], torch.full((HEADS, page_size), 7.0)), "pages of others are not touched"
    assert mass[1, :, -1].gt(0).all()


def test_observe_takes_over_what_attend_has_computed(kernels):
    """One query a row, three of five rows observed, long enough for several splits: bit for bit what observe computes alone."""
    d, page_size, slots = 32, 16, [1, 16, 40, 500, 1300]
    cache = poisoned_cache(sum(cdiv(n, page_size) for n in slots) + 1, page_size, d, torch.float32)
    pages, first = torch.zeros(len(slots), cdiv(max(slots), page_size), dtype=torch.int64), 1
    for row, n in enumerate(slots):
        pages[row, : cdiv(n, page_size)] = torch.arange(first, first := first + cdiv(n, page_size))
    used = torch.arange(1, first)
    cache.keys[used], cache.values[used] = torch.randn(2, len(used), HEADS, page_size, d)
    work = attend_work(pages, [n - 1 for n in slots], [1] * len(slots))
    work.observe_from, work.restart = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([True, False, False, False, True])
    query = torch.randn(len(slots), HEADS * 4, d)
    output, lse = run_attend(kernels, cache, query, work, 0.2, False)
    taken = torch.full((len(cache.keys), HEADS, page_size), 7.0)
    alone, want = taken.clone(), taken.clone()
    kernels.observe(cache, taken, query, lse, work, 0.2)
    kernels.observe(cache, alone, query, lse, replace(work, logits=None), 0.2)
    reference.observe(cache, want, query, lse, work, 0.2)
    assert torch.equal(taken, alone)
    torch.testing.assert_close(taken[used], want[used], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_the_other_instruction_sets(isa):
    """The same cases in a process that may not use the best one."""
    # -P: the installed package, not the folder that the tests run in.
    pytest_ = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_, __file__, "-k", "cpu and not instruction_sets"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MOMENTKV_CPU_ISA": isa})
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_operators_check_what_they_are_given():
    """A wrong tensor is an error that names it, never memory of someone else."""
    cpu = dispatch.select("cpu")
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    output = torch.empty_like(query)
    with pytest.raises(RuntimeError, match="output"):
        cpu.attend(cache, query, output[:, :4], None, work, 0.1, True)
    with pytest.raises(RuntimeError, match="query"):
        cpu.attend(cache, query.float(), output.float(), None, work, 0.1, True)
    narrow = replace(work, moment_pages=work.moment_pages[:, :1].contiguous())
    with pytest.raises(RuntimeError, match="moment_pages has 1 pages of .* bytes a head; its record needs"):
        cpu.attend(cache, query, output, None, narrow, 0.1, True)
    with pytest.raises(RuntimeError, match="logits are left for one query a row"):
        cpu.attend(cache, query, output, None, replace(work, most_queries=1), 0.1, True)
    work.last[3] = 10_000
    with pytest.raises(RuntimeError, match="row 3 sees more slots"):
        cpu.attend(cache, query, output, None, work, 0.1, True)


def test_a_named_family_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch.select("cpu"), "objections", lambda: ["no compiler"])
    assert dispatch.select("auto") is reference
    with pytest.raises(ValueError, match="'cpu' cannot run here: no compiler"):
        dispatch.select("cpu")


@pytest.mark.parametrize(("name", "device"), [("cpu", "cuda"), ("triton", "cpu")])
def test_a_named_family_must_run_on_the_device(name, device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"does not run on '{device}' tensors"):
        dispatch.select(name, device)
