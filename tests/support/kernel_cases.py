"""Caches, work lists and batches of the kernel tests; everything that must not be read is poisoned by NaN."""

import math
import os
from dataclasses import replace

import torch

from momentkv_vllm import moments
from momentkv_vllm.fp8 import is_fp8
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find

HEADS = 2


def poisoned_cache(pages, page_size, head_dim, dtype, **record):
    kv = torch.full((pages, HEADS, page_size, 2 * head_dim), math.nan, dtype=dtype)
    return CacheView.of_vllm_cpu(kv, RecordLayout(head_dim, **record))


# Triton needs a GPU or its interpreter, which must be chosen before Triton is imported: test_interpreter.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES = ["cpu", "reference", *["triton"] * INTERPRETED]
# A kernel that is interpreted takes a second where it should take 10 us.
LONG = [130, 280] if INTERPRETED else [700, 1400]
# The head size of Gemma 4's full-attention layers; beyond the limits of the Triton kernels.
WIDEST = [] if INTERPRETED else [512]


def beside(cache, x):
    """x in the dtype of what is written to a cache and compared with it."""
    return x if is_fp8(cache.kv.dtype) else x.to(cache.kv.dtype)


def attend_work(pages, last, queries, moment_pages=None, count=0.0):
    """One work list: row i has `queries[i]` queries, its first one sees slots 0..last[i]."""
    last, queries = torch.tensor(last), torch.tensor(queries)
    moment_pages = torch.zeros(len(last), 0, dtype=torch.long) if moment_pages is None else moment_pages
    first_token = queries.cumsum(0) - queries
    return AttendWork(first_token, queries, pages, last, moment_pages, torch.full((len(last),), count))


def run_attend(kernels, cache, query, work, scale, corrected):
    """(output, lse); both start as NaN, the query is in the cache's dtype unless that is fp8."""
    query = beside(cache, query)
    output = torch.full_like(query, math.nan)
    lse = torch.full(query.shape[:2], math.nan)
    kernels.attend(cache, query, output, lse, work, scale, corrected)
    return output, lse


def run_both(kernels, cache, observed, query, work, scale, corrected, changed=()):
    """(output, lse) of `attend`, then `observe`, and that a family's way to do both at once gives the same: the bits, if each of
    its items does the same sums. `changed`: what observing may change, if not `observed` alone."""
    changed = changed or [observed.data]
    before = [data.clone() for data in changed]
    output, lse = run_attend(kernels, cache, query, work, scale, corrected)
    kernels.observe(cache, observed, beside(cache, query), lse, work, scale)
    want = [data.clone() for data in changed]
    for data, as_it_was in zip(changed, before, strict=True):
        data.copy_(as_it_was)
    again = torch.full_like(output, math.nan)
    kernels.attend_and_observe(cache, observed, beside(cache, query), again, work, scale, corrected)
    assert torch.equal(again.nan_to_num(7), output.nan_to_num(7))
    close = {"rtol": 1e-4, "atol": 1e-6} if kernels.name == "triton" else {"rtol": 0, "atol": 0}
    for data, wanted in zip(changed, want, strict=True):
        torch.testing.assert_close(data, wanted, **close, equal_nan=True)
    return output, lse


def attends_and_observes_like_the_reference(kernels, cache, work, query, corrected):
    """Asserts that outputs, logsumexps and observed attention are the reference's; the output."""
    reference, scale = select("reference"), query.shape[-1] ** -0.5
    want, want_lse = run_attend(reference, cache, query, work, scale, corrected)
    output, lse = run_attend(kernels, cache, query, work, scale, corrected)
    assert not output.isnan().any()
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[query.dtype]
    torch.testing.assert_close(output, want, rtol=rounding, atol=2**-7 if on_units(kernels, cache) else 1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    want_mass, mass = (torch.full(cache.keys.shape[:3], 7.0) for _ in range(2))
    reference.observe(cache, Observed(want_mass), query, want_lse, work, scale)
    kernels.observe(cache, Observed(mass), query, want_lse, work, scale)
    used = torch.cat([row[row > 0] for row in work.pages])
    torch.testing.assert_close(mass[used], want_mass[used], rtol=1e-4, atol=1e-5)
    if work.weights is not None:
        alone = torch.full_like(mass, 7.0)
        kernels.observe(cache, Observed(alone), query, want_lse, replace(work, weights=None), scale)
        assert_observed_alike(kernels, cache, mass, alone)
    run_both(kernels, cache, Observed(torch.full_like(mass, 7.0)), query, work, scale, corrected)
    return output


def on_units(kernels, cache):
    """Whether rows with several queries are attended on AMX: weights are bfloat16 there, half a step of it off where they are 1. So
    are keys of a quantised store, and queries rotated for them."""
    return kernels.name == "cpu" and kernels.isa() == "amx" and cache.kv.dtype is torch.bfloat16


def assert_observed_alike(kernels, cache, left, computed):
    """What attend leaves to observe is what observe computes: bit by bit, except where matrix units attend."""
    rounding = 5e-3 if cache.packed else 1e-4
    close = {"rtol": rounding, "atol": 1e-7} if on_units(kernels, cache) else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(left, computed, **close)


def serving_batch(dtype, head_dim, moment_dtype, correction, groups, page_size=16, seed=0, query_dtype=None):
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
    cache.record_layout = record
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
    work.num_evicted = torch.tensor(counts, dtype=torch.float32)
    work.observe_from = torch.tensor([0, 1, 0, 0, 1, 3, 33])
    work.restart = torch.tensor([True, False] * 4)[: len(last)]
    query = 2 * torch.randn(sum(queries), HEADS * groups, head_dim, generator=generator)
    return cache, work, query.to(query_dtype or dtype)


BATCHES = [
    (torch.bfloat16, 128, "bfloat16", "first", 4),
    (torch.bfloat16, 64, "float32", "first", 3),
    (torch.float16, 80, "bfloat16", "first", 7),
    (torch.float32, 32, "float32", "first", 1),
    (torch.float32, 256, "bfloat16", "zeroth", 16),
    (torch.bfloat16, 128, "int8", "first", 8),
    (torch.float16, 80, "int8", "first", 2),
    *[(torch.bfloat16, d, "bfloat16", "first", 4) for d in WIDEST],
]


def observed(policy, shape, generator):
    """What a policy may have observed of every slot; None if it observes nothing."""
    observes = find(policy).observes
    if observes is None:
        return None
    return Observed(torch.rand(*shape, *observes.numbers, generator=generator), observes.what)
