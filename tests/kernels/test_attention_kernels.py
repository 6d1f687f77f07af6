"""Attention, storing and observing of every kernel family: against plain softmax and against the reference on odd sizes."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import (
    BATCHES,
    FAMILIES,
    HEADS,
    INTERPRETED,
    LONG,
    WIDEST,
    attend_work,
    attends_and_observes_like_the_reference,
    on_units,
    poisoned_cache,
    run_attend,
    serving_batch,
)
from quick import quick

from momentkv_vllm import moments
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, mapped
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.page_schedule import cdiv

reference = select("reference")
# The reference, compared with itself, shows that it reads nothing poisoned: with the record all that it reads without. It is slow;
# two orders of the correction and two data types are enough for that.
CASES = [(*fc, batch) for fc in product(FAMILIES, (False, True)) for batch in BATCHES if fc != ("reference", False)]
QUICK = [case for case in CASES if case[0] != "reference" or case[2] in (BATCHES[1], BATCHES[4])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "groups", "page_size", "tokens"),
    [(32, 1, 16, 1), (64, 4, 16, 37), (80, 2, 32, 32), (256, 8, 128, 129), *[(d, 3, 64, 130) for d in WIDEST]],
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
    atol = 2**-7 if on_units(kernels, cache) else 1e-5
    for i in range(queries):
        seen = slice(0, tokens - queries + i + 1)
        for h in range(HEADS * groups):
            k, v = keys[h // groups, seen].double(), values[h // groups, seen].double()
            logits = scale * k @ query[i, h].double()
            want = torch.softmax(logits, 0) @ v
            assert torch.allclose(output[i, h].double(), want, rtol=rounding, atol=atol), (i, h)
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


@pytest.mark.parametrize(
    ("kernels", "corrected", "batch"), quick(QUICK, CASES), indirect=["kernels"],
    ids=lambda x: f"{x[0]}-d{x[1]}-{x[2]}-{x[3]}-g{x[4]}" if isinstance(x, tuple) else None,
)  # fmt: skip
def test_attend_and_observe_agree_with_the_reference(kernels, batch, corrected):
    cache, work, query = serving_batch(*batch)
    output = attends_and_observes_like_the_reference(kernels, cache, work, query, corrected)
    again, _ = run_attend(kernels, cache, query, work, query.shape[-1] ** -0.5, corrected)
    assert torch.equal(output, again)


def test_a_row_does_not_depend_on_its_batch(kernels):
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    together, _ = run_attend(kernels, cache, query, work, 0.125, True)
    for row in range(len(work.last_slot)):
        alone = AttendWork(*(getattr(work, f)[row : row + 1] for f in list(AttendWork.__dataclass_fields__)[:6]))
        output, _ = run_attend(kernels, cache, query, alone, 0.125, True)
        tokens = slice(int(alone.first_token), int(alone.first_token) + int(alone.num_queries))
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
def test_write_stores_tokens_and_clears_fresh_pages(kernels, dtype):
    cache = poisoned_cache(4, 16, 64, dtype)
    packed = torch.randn(21, HEADS * 3, 64).to(dtype)  # as in a model: q, k and v of a token side by side
    key, value = packed[:, HEADS : 2 * HEADS], packed[:, 2 * HEADS :]
    slots = torch.tensor([*range(28, 32), *range(48, 64), -1])  # a page's end, a fresh page, padding
    mass = torch.full(cache.keys.shape[:3], 5.0)
    before = cache.kv.clone()
    kernels.write(cache, key, value, slots, Observed(mass))
    for i, slot in enumerate(slots[:-1].tolist()):
        assert torch.equal(cache.keys[slot // 16, :, slot % 16], key[i])
        assert torch.equal(cache.values[slot // 16, :, slot % 16], value[i])
    for untouched in (0, 2):
        assert torch.equal(cache.kv[untouched].view(torch.uint8), before[untouched].view(torch.uint8))
    assert cache.keys[1, :, :12].isnan().all() and not mass[3].any() and mass[1].eq(5).all()
    kernels.write(cache, key[:1], value[:1], torch.tensor([32]), None)
    assert (
        torch.equal(cache.keys[2, :, 0], key[0]) and not cache.keys[2, :, 1:].any() and not cache.values[2, :, 1:].any()
    )


def test_observe_sums_the_attention_of_observed_queries(kernels):
    d, page_size = 32, 16
    cache = poisoned_cache(3, page_size, d, torch.float32)
    cache.keys[1:], cache.values[1:] = torch.randn(2, HEADS, page_size, d), torch.randn(2, HEADS, page_size, d)
    work = attend_work(torch.tensor([[2, 1]]), [29], [3])
    work.observe_from, work.restart = torch.tensor([1]), torch.tensor([True])
    query = torch.randn(3, HEADS * 2, d)
    _, lse = run_attend(kernels, cache, query, work, 0.2, False)
    mass = torch.full((3, HEADS, page_size), 7.0)
    kernels.observe(cache, Observed(mass), query, lse, work, 0.2)
    assert torch.allclose(mass[1:].sum((0, 2)), torch.full((HEADS,), 4.0), atol=1e-4), (
        "2 queries x 2 heads, mass 1 each"
    )
    assert torch.equal(mass[0], torch.full((HEADS, page_size), 7.0)), "pages of others are not touched"
    assert mass[1, :, -1].gt(0).all()


def test_observe_takes_over_what_attend_has_computed(kernels):
    """One query a row, three of five rows observed, long enough for several splits: what observe computes alone, up to
    the rounding of one more product."""
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
    kernels.observe(cache, Observed(taken), query, lse, work, 0.2)
    kernels.observe(cache, Observed(alone), query, lse, replace(work, weights=None), 0.2)
    reference.observe(cache, Observed(want), query, lse, work, 0.2)
    torch.testing.assert_close(taken, alone, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(taken[used], want[used], rtol=1e-4, atol=1e-5)


def test_what_is_observed_depends_on_the_row_alone(kernels):
    """Whatever else is in the batch, on however many threads: rows in one piece, in several, and a chunk in several."""
    d, page_size, ends, queries = 64, 16, [40, *LONG, 90], [1, 1, 1, 50]
    cache = poisoned_cache(sum(cdiv(n, page_size) for n in ends) + 1, page_size, d, torch.bfloat16)
    pages, first = torch.zeros(len(ends), cdiv(max(ends), page_size), dtype=torch.int64), 1
    for row, n in enumerate(ends):
        pages[row, : cdiv(n, page_size)] = torch.arange(first, first := first + cdiv(n, page_size))
    cache.kv[1:] = torch.randn(cache.kv[1:].shape).to(cache.kv.dtype)
    query = torch.randn(sum(queries), HEADS * 4, d).bfloat16()
    work = attend_work(pages, [n - q for n, q in zip(ends, queries, strict=True)], queries)
    work.observe_from, work.restart = torch.tensor([0, 0, 0, 30]), torch.tensor([True, False, True, False])
    together, mass = torch.empty_like(query), torch.full((len(cache.keys), HEADS, page_size), 7.0)
    kernels.attend_and_observe(cache, Observed(mass), query, together, work, 0.125, False)
    threads = torch.get_num_threads()
    try:
        for row in range(len(ends)):
            torch.set_num_threads(1 + row % 2)
            one = mapped(work, lambda _, x, row=row: x[row : row + 1])
            one.weights = None
            alone, its = torch.empty_like(query), torch.full_like(mass, 7.0)
            kernels.attend_and_observe(cache, Observed(its), query, alone, one, 0.125, False)
            used, tokens = pages[row, : cdiv(ends[row], page_size)], one.tokens()
            assert torch.equal(its[used], mass[used]) and torch.equal(alone[tokens], together[tokens]), ends[row]
            assert its[used].ne(7.0).any()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not INTERPRETED, reason="the other families do not compute addresses in Triton")
@pytest.mark.parametrize("family", ["triton"])
def test_heads_may_lie_further_apart_than_32_bits_reach(family):
    """vLLM's layout LHBNC in a large pool: all pages of a head, then all of the next."""
    kernels, d, far = select(family), 32, 1 << 30
    # Memory of which little more than the written pages becomes real.
    pool = torch.empty(2 * far + 4 * 16 * 2 * d, dtype=torch.bfloat16)
    kv = pool.as_strided((4, 3, 16, 2 * d), (16 * 2 * d, far, 2 * d, 1))
    near = CacheView.of_vllm_gpu(torch.zeros(kv.shape, dtype=kv.dtype), RecordLayout(d, has_covariance=False))
    cache = CacheView.of_vllm_gpu(kv, near.record_layout)
    key, value, slots = *torch.randn(2, 20, 3, d).to(kv.dtype), torch.arange(16, 36)
    for kernel, view in ((reference, near), (kernels, cache)):
        kernel.write(view, key, value, slots, None)
    assert torch.equal(kv[1:3], near.kv[1:3])
    work = attend_work(torch.tensor([[1, 2], [1, 2]]), [19, 15], [1, 3])
    query = torch.randn(4, 3, d).to(kv.dtype)
    got, want = (run_attend(k, view, query, work, 0.2, False)[0] for k, view in ((kernels, cache), (reference, near)))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
