"""Quantised stores: the bytes of a tile, and sequences played token by token through every kernel family."""

import math
from dataclasses import fields, replace

import pytest
import torch
from kernel_cases import INTERPRETED, assert_observed_alike, attend_work, beside, on_units, run_attend, run_both

from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.key_rounding import feedback_of
from momentkv_vllm.packed_store import GROUP, Packed, PackedLayout, PackedPages, quantised, rounded_up
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find
from momentkv_vllm.rotation import rotated

HEADS = 2
REFERENCE = select("reference")
DIMS = [16, 64, 80, 96, 128, 256]


def test_rotation_is_orthonormal_and_its_own_inverse():
    x = torch.randn(7, 96)
    torch.testing.assert_close(rotated(rotated(x)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated(x).norm(dim=-1), x.norm(dim=-1))
    one = rotated(torch.eye(64)[3])
    torch.testing.assert_close(one.abs(), torch.full((64,), 1 / 8), msg="one channel is spread over all")


def test_scales_are_never_rounded_down():
    x = torch.rand(1000) * 10 ** torch.linspace(-30, 30, 1000)
    up = rounded_up(x)
    assert (up.float() >= x).all() and (up.float() <= x * (1 + 2**-7)).all()
    assert rounded_up(torch.tensor([0.0, math.inf])).tolist() == [0.0, math.inf]
    assert rounded_up(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("levels", [16, 254])
def test_an_error_is_at_most_half_a_step(levels):
    x = torch.randn(500, GROUP) * torch.rand(500, 1)
    codes, scales = quantised(x, levels)
    assert codes.min() >= -levels // 2 and codes.max() <= levels // 2 - 1
    error = ((codes + 0.5) * scales.float().unsqueeze(-1) - x).abs()
    assert (error <= 0.5001 * scales.float().unsqueeze(-1)).all()
    assert not quantised(torch.zeros(1, GROUP), levels)[1].any(), "a zero vector has scale zero, not a division by it"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", DIMS)
def test_tiles_hold_what_was_written(dtype, head_dim):
    layout = PackedLayout(dtype, head_dim)
    raw = torch.full((6, HEADS, 32 * 2 * head_dim * 2), 255, dtype=torch.uint8)
    cache = PackedPages(raw, layout)
    pages, slots = torch.tensor([[1, 3], [4, 2]]), 2 * cache.page_tokens
    keys, values = torch.randn(2, 2, HEADS, slots, head_dim)
    written = Packed.of(keys, values, layout)
    cache.write(pages, written)
    read = cache.read(pages)
    assert all(torch.equal(getattr(read, f.name), getattr(written, f.name)) for f in fields(Packed))
    worst = {"int8": 0.01, "int4": 0.13}[dtype]
    for numbers, x in zip(read.numbers(layout), (keys, values), strict=True):
        assert (rotated(numbers)[..., :head_dim] - x).norm() < worst * x.norm()
    assert (raw[0] == 255).all() and (raw[5] == 255).all()
    assert (raw[..., cache.page_tiles * layout.tile_bytes :] == 255).all(), "what lies behind the tiles stays"


def ask(kernels, cache, observed, work, head_dim, first):
    """(output, logsumexp) of one random query, which is observed if the policy wants that."""
    query = beside(cache, torch.randn(1, 2 * HEADS, head_dim))
    if observed is not None:
        work.observe_from, work.restart = torch.tensor([0]), torch.tensor([first])
    given = query, work, head_dim**-0.5, True
    output, lse = run_attend(kernels, cache, *given) if observed is None else run_both(kernels, cache, observed, *given)
    return output.float(), lse


def play(
    family, dtype, run, policy, store_pages, head_dim, page_size, cache_dtype=torch.bfloat16, outliers=False, total=0,
    every=1, scales=(1.0, 1.0), sinks=4, feedback=None, odd=False,
):  # fmt: skip
    """A sequence of `total` tokens, or of 25 pages, of which every `every`-th one asks, written as many at a time (within a
    page): (outputs, logsumexps; bytes of the store after every event; the moments; how many)."""
    torch.manual_seed(0)
    total = total or 25 * page_size
    kernels, policy = select(family), find(policy)()
    packed, part = PackedLayout(dtype, head_dim), page_size * 2 * head_dim * cache_dtype.itemsize
    record = RecordLayout(head_dim, has_covariance=False, has_centres=True)
    record = replace(record, start=(part - record.num_bytes) // 64 * 64)
    kv = torch.full((64, HEADS, page_size, 2 * head_dim), math.nan, dtype=cache_dtype)
    cache = CacheView.of_vllm_cpu(kv, record, packed)
    cache.key_scale, cache.value_scale = scales
    cache.feedback = feedback
    last_tiles = min(cache.packed.page_tiles, record.start // packed.tile_bytes)
    capacity = ((store_pages - 1) * cache.packed.page_tokens + last_tiles * 8) // run * run
    budget_pages, scale = 2 * store_pages + 2, head_dim**-0.5
    keys, values = torch.randn(2, total, HEADS, head_dim)
    if outliers:
        given_outliers(keys)
    if odd:
        keys[5], keys[9, :, 3], keys[20, 0, 70], keys[30] = math.nan, math.inf, -math.inf, 0
    keys, values = beside(cache, keys), beside(cache, values)
    observed = Observed.of(cache, "mass") if policy.observes else None
    outputs, stores, stored, boundary, evicted = [], [], 0, 0, 0
    step = min(every, page_size)
    for t in range(step - 1, total, step):
        new, page = slice(t + 1 - step, t + 1), 1 + t // page_size
        kernels.write(cache, keys[new], values[new], page_size + torch.arange(total)[new], observed)
        if (t + 1) % every == 0:
            columns = [*range(store_pages)] * (boundary > 0) + [*range(boundary, page)]
            attend = AttendWork(
                first_token=torch.tensor([0]), num_queries=torch.tensor([1]), pages=torch.tensor([columns]) + 1,
                last_slot=torch.tensor([t - boundary * page_size]), moment_pages=torch.tensor([[store_pages]]),
                num_evicted=torch.tensor([float(evicted)]), stored=torch.tensor([stored]), store_pages=store_pages,
            )  # fmt: skip
            outputs.append(ask(kernels, cache, observed, attend, head_dim, first=not outputs))
        if t + 1 >= budget_pages * page_size and (t + 1) % page_size == 0:
            first = boundary or store_pages
            retire = RetireWork(
                store_pages=torch.arange(store_pages)[None] + 1, retiring_pages=torch.tensor([[1 + first]]),
                moment_pages=torch.tensor([[store_pages]]), num_evicted=torch.tensor([float(evicted)]), run_tokens=run,
                stored=torch.tensor([stored]), store_tokens=capacity,
            )  # fmt: skip
            kernels.consolidate(cache, observed, retire, policy, sinks, scale)
            boundary = first + 1
            stored, evicted = min(capacity, boundary * page_size), max(0, boundary * page_size - capacity)
            whole, rest = divmod(stored, cache.packed.page_tokens)
            stores.append(cache.raw[1 : 1 + whole, :, : cache.packed.page_tiles * packed.tile_bytes].clone())
            stores.append(cache.raw[1 + whole, :, : rest // 8 * packed.tile_bytes].clone())
            stores.append(cache.read_centres(torch.tensor([[store_pages]])))
            kv[1 + first] = math.nan
    moments = cache.read_moments(torch.tensor([[store_pages]]), torch.tensor([float(evicted)]))
    return outputs, stores, moments, evicted


CASES = [
    ("int4", 1, "keydiff", 2, 64, 16), ("int4", 8, "h2o", 4, 64, 16), ("int4", 16, "keydiff", 3, 128, 16),
    ("int4", 8, "random", 3, 80, 32), ("int8", 1, "h2o", 2, 64, 16), ("int8", 8, "keydiff", 3, 32, 16),
    ("int8", 16, "keydiff", 4, 128, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_cpu_reads_a_store_as_the_reference_does(dtype, head_dim):
    layout = PackedLayout(dtype, head_dim)
    kv = torch.zeros(5, HEADS, 32, 2 * head_dim, dtype=torch.bfloat16)
    cache = CacheView.of_vllm_cpu(kv, RecordLayout(head_dim), layout)
    pages = torch.tensor([[1, 4], [3, 2]])
    keys, values = torch.randn(2, 2, HEADS, 2 * cache.packed.page_tokens, head_dim)
    cache.packed.write(pages, Packed.of(keys, values, layout))
    for got, want in zip(*(select(family).read_store(cache, pages) for family in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


FP8_CASE = "int4", 8, "momentkv", 3, 64, 32

# Family, case, how many tokens and which of them ask: of a policy that observes every query, all. Triton's interpreter takes a second for what takes 10 us.
PLAYED = [("cpu", case, 0, 1 if case[2] == "h2o" else 4) for case in CASES]
PLAYED += [
    ("triton", ("int4", 8, "momentkv", 2, 32, 16), 160, 16),
    ("triton", ("int4", 16, "keydiff", 2, 80, 32), 320, 64),
    ("triton", ("int8", 1, "h2o", 2, 64, 16), 128, 16),
] * INTERPRETED


@pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_stores_are_quantised_from_what_fp8_holds(numbers):
    given = {"cache_dtype": numbers, "scales": (0.3, 2.5), "every": 4}
    answer_alike(play("reference", *FP8_CASE, **given), play("cpu", *FP8_CASE, **given))


@pytest.mark.parametrize(("family", "case", "total", "every"), PLAYED, ids=str)
def test_kernels_store_the_same_bytes_and_answer_alike(family, case, total, every):
    answer_alike(*(play(one, *case, total=total, every=every) for one in ("reference", family)))


FED_BACK = [
    ("cpu", ("int4", 8, "momentkv", 3, 64, 16), 0),
    ("cpu", ("int4", 16, "keydiff", 2, 80, 32), 0),
    ("cpu", ("int4", 8, "keydiff", 2, 512, 32), 0),
    ("cpu", ("int8", 8, "keydiff", 2, 128, 16), 0),
]
FED_BACK += [
    ("triton", ("int4", 8, "momentkv", 2, 80, 16), 160),
    ("triton", ("int8", 8, "h2o", 2, 64, 16), 160),
] * INTERPRETED


@pytest.mark.parametrize(("family", "case", "total"), FED_BACK, ids=str)
def test_errors_of_keys_that_are_fed_back_are_the_same_bytes(family, case, total):
    dtype, *_, head_dim, _ = case
    feedback = feedback_of(skewed_moment(head_dim), PackedLayout(dtype, head_dim).width)
    want, got = (play(one, *case, feedback=feedback, total=total, every=16) for one in ("reference", family))
    answer_alike(want, got)
    alone = play("cpu", *case, total=total, every=16)
    assert any(not torch.equal(a, b) for a, b in zip(got[1], alone[1], strict=True)), "feedback must matter"


@pytest.mark.parametrize("family", ["cpu", *["triton"] * INTERPRETED])
def test_keys_that_are_not_finite_feed_nothing_back_in_the_same_bytes(family):
    """A store's first event, where there is room for all of them. The first key is its own centre: a zero."""
    case, layout = ("int4", 8, "momentkv", 2, 80, 16), PackedLayout("int4", 80)
    given = {"feedback": feedback_of(skewed_moment(80), layout.width), "total": 96, "every": 96, "odd": True}
    want, got = (
        Packed.from_tiles(play(one, *case, **given)[1][0].unflatten(2, (-1, layout.tile_bytes)), layout)
        for one in ("reference", family)
    )
    assert want.key_scales[0, :, 5].isnan().all() and not want.key_scales[0, :, 0].any()
    for f in fields(Packed):  # a scale that is NaN is one of many
        torch.testing.assert_close(*(getattr(x, f.name) for x in (got, want)), rtol=0, atol=0, equal_nan=True)


def skewed_moment(head_dim):
    """Second moments of queries that lie mostly in few directions."""
    queries = torch.randn(HEADS, 4 * head_dim, head_dim) @ torch.diag(2.0 ** -torch.arange(head_dim).div(4))
    turned = queries @ torch.linalg.qr(torch.randn(head_dim, head_dim))[0]
    return turned.transpose(1, 2) @ turned


def answer_alike(want, got):
    assert want[3] > 0, "something must have been evicted"
    for (a, a_lse), (b, b_lse) in zip(want[0], got[0], strict=True):
        torch.testing.assert_close(b, a, atol=1e-2, rtol=2e-2)
        torch.testing.assert_close(b_lse, a_lse, atol=1e-3, rtol=0)
    for number, (a, b) in enumerate(zip(want[1], got[1], strict=True)):
        assert torch.equal(a, b), f"store {number} differs in {(a != b).float().mean():.1%} of its bytes"
    torch.testing.assert_close(got[2].mean_key, want[2].mean_key, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[2].mean_value, want[2].mean_value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_several_queries_and_rows_of_every_kind(kernels, dtype):
    """A full store, one that still has room, exact pages and padding: in one work list, decode beside chunks."""
    head_dim, page_size, store_pages = 64, 16, 2
    kv = torch.randn(24, HEADS, page_size, 2 * head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    kv[0] = math.nan
    cache = CacheView.of_vllm_cpu(kv, RecordLayout(head_dim, has_covariance=False), PackedLayout(dtype, head_dim))
    slots = store_pages * cache.packed.page_tokens
    pages = torch.arange(1, 21).view(4, 5)
    pages[0, 4] = 0
    keys, values = torch.randn(2, 3, HEADS, slots, head_dim, generator=torch.Generator().manual_seed(1))
    cache.packed.write(pages[[0, 1, 3], :store_pages], Packed.of(keys, values, cache.packed_layout))
    kv[pages[0, 3]], kv[pages[2, 4]] = math.nan, math.nan
    work = attend_work(pages, [10, 40, 37, 20], [1, 5, 7, 1])
    work.stored, work.store_pages = torch.tensor([slots, slots - 24, 0, 8]), store_pages
    work.observe_from, work.restart = torch.tensor([0, 2, 0, 1]), torch.tensor([True, False, False, True])
    query = torch.randn(14, 2 * HEADS, head_dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    (want, want_lse), (got, lse) = (run_attend(k, cache, query, work, 0.125, False) for k in (REFERENCE, kernels))
    torch.testing.assert_close(got.float(), want.float(), atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=0)
    want_mass, mass = (torch.full((24, HEADS, cache.page_slots), 0.5) for _ in range(2))
    REFERENCE.observe(cache, Observed(want_mass), query, want_lse, work, 0.125)
    kernels.observe(cache, Observed(mass), query, want_lse, work, 0.125)
    if work.weights is not None:
        alone = torch.full_like(mass, 0.5)
        kernels.observe(cache, Observed(alone), query, want_lse, replace(work, weights=None), 0.125)
        assert_observed_alike(kernels, cache, mass, alone)
    run_both(kernels, cache, Observed(torch.full_like(mass, 0.5)), query, work, 0.125, False)
    for row, stored in enumerate(work.stored.tolist()):
        store, exact = pages[row].split([store_pages, 5 - store_pages]) if stored else (pages[row, :0], pages[row])
        seen = [
            x[store][..., : cache.packed.page_tokens].transpose(0, 1).flatten(1)[:, :stored] for x in (mass, want_mass)
        ]
        torch.testing.assert_close(*seen, atol=2e-3, rtol=1e-2)
        end = int(work.last_slot[row] + work.num_queries[row])
        seen = [x[exact][..., :page_size].transpose(0, 1).flatten(1)[:, :end] for x in (mass, want_mass)]
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "worst"), [("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("outliers", [False, True])
def test_cpu_answers_until_the_store_is_full_are_nearly_exact(dtype, worst, outliers):
    """Nothing is evicted until then; a part that all keys have (as Qwen2.5's biases make it), and a first key unlike all others,
    cost no accuracy."""
    budget = 14 * 16
    outputs, *_, evicted = play("cpu", dtype, 8, "keydiff", 6, 64, 16, torch.float32, outliers, total=240)
    assert not evicted
    want = exact_attention(len(outputs), outliers)
    errors = torch.stack([(out - exact).norm() / exact.norm() for (out, _), exact in zip(outputs, want, strict=True)])
    assert errors[:budget].max() < 1e-3 and errors[budget:].mean() < worst


def given_outliers(keys):
    """A part that all keys have; the first key is unlike all others."""
    keys[..., 3] += 30
    keys[0, :, 5] += 10


def exact_attention(total, outliers):
    """What `play` would answer with everything kept: the same numbers, drawn in the same order."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, total, HEADS, 64)
    if outliers:
        given_outliers(keys)
    for t in range(total):
        k, v = (x[: t + 1].repeat_interleave(2, 1) for x in (keys, values))
        weight = (torch.einsum("hd,thd->ht", torch.randn(1, 2 * HEADS, 64)[0], k) / 8).softmax(-1)
        yield torch.einsum("ht,thd->hd", weight, v)[None]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_query_does_not_depend_on_those_beside_it(dtype, head_dim):
    """However a prompt is cut, and whatever else is in the step: the same bits on AMX, else the same to rounding."""
    kernels, groups, page_size, store_pages, queries = select("cpu"), 3, 16, 4, 75
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(14, HEADS, page_size, 2 * head_dim, generator=generator).bfloat16()
    record = RecordLayout(head_dim, has_covariance=False, has_centres=True)
    cache = CacheView.of_vllm_cpu(kv, record, PackedLayout(dtype, head_dim))
    pages, slots = torch.arange(1, 14)[None], store_pages * cache.packed.page_tokens
    stored = torch.randn(2, 1, HEADS, slots, head_dim, generator=generator)
    cache.packed.write(pages[:, :store_pages], Packed.of(*stored, cache.packed_layout))
    cache.write_centres(torch.tensor([[13]]), torch.randn(1, HEADS, 2, head_dim, generator=generator))
    query = torch.randn(queries, groups * HEADS, head_dim, generator=generator).bfloat16()

    def attended(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        work = attend_work(pages[:, :12], [20 + first], [end - first], torch.tensor([[13]]))
        work.stored, work.store_pages = torch.tensor([slots - 8]), store_pages
        return run_attend(kernels, cache, query[first:end], work, 0.125, False)

    whole, lse = attended(0, queries)
    for first, end in ((0, 2), (2, 40), (40, 75)):
        part, part_lse = attended(first, end)
        if on_units(kernels, cache):
            assert torch.equal(part, whole[first:end]) and torch.equal(part_lse, lse[first:end])
        torch.testing.assert_close(part, whole[first:end], rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(part_lse, lse[first:end], rtol=1e-6, atol=1e-6)
