"""The CUDA kernels against the reference: without a GPU their own source and operators, run on the CPU by csrc/cuda/emulate.h;
with one, and the extension built, the same cases there. What nvcc makes of them is in test_cuda_compiles.py."""

import math

import cuda_emulated
import kernel_cases as shared
import pytest
import test_attention_kernels
import test_consolidation_kernels
import torch
from cuda_device import OnDevice

from momentkv_vllm import moments
from momentkv_vllm.kernels import cuda as module
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import RetireWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import find

cuda, reference = module.Cuda(), select("reference")


def gpu_view(kv: torch.Tensor, record: RecordLayout) -> CacheView:
    """vLLM's GPU layout in logical order, [num_pages, heads, page_size, 2 * head_dim], a slot's key before its value."""
    d = kv.shape[-1] // 2
    return CacheView(kv[..., :d], kv[..., d:], kv, kv.view(*kv.shape[:2], -1).view(torch.uint8), record)


def nhd(cache: CacheView) -> CacheView:
    """A copy whose slots lie head beside head. The reference cannot write records there (`raw` is a copy)."""
    kv = cache.kv.transpose(1, 2).contiguous().transpose(1, 2)
    d = kv.shape[-1] // 2
    return CacheView(kv[..., :d], kv[..., d:], kv, cache.raw, cache.record_layout)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if cuda_emulated.compiler() is None:
        pytest.skip("g++ is missing")
    torch.ops.load_library(cuda_emulated.build(tmp_path_factory.mktemp("cuda_emulated")))
    module.register_fakes("momentkv_cuda_emulated")


@pytest.fixture
def emulated(library, monkeypatch):
    """The family `cuda` on CPU tensors."""
    monkeypatch.setattr(CacheView, "of_vllm_cpu", staticmethod(gpu_view))
    monkeypatch.setattr(module, "_ops", torch.ops.momentkv_cuda_emulated)
    return cuda


@pytest.fixture(params=["emulated", *["gpu"] * (not cuda.objections())])
def kernels(request, monkeypatch):
    """The family, given CPU tensors: emulated, and where there is one on a GPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    monkeypatch.setattr(CacheView, "of_vllm_cpu", staticmethod(gpu_view))
    return OnDevice(cuda, "cuda")


@pytest.fixture
def last_thread_first(monkeypatch):
    """Threads run in the other order: where a barrier is missing, one of the two orders gives other numbers."""
    return lambda: monkeypatch.setenv("MOMENTKV_EMULATE_REVERSE", "1")


BATCHES = [
    (torch.bfloat16, 128, "bfloat16", "first", 4, 16),
    (torch.float16, 64, "float32", "first", 3, 32),
    (torch.bfloat16, 64, "int8", "first", 8, 16),
    (torch.float16, 128, "int8", "first", 1, 128),
    (torch.bfloat16, 256, "bfloat16", "zeroth", 7, 48),
    (torch.float16, 256, "float32", "first", 2, 16),
    (torch.bfloat16, 128, "bfloat16", "zeroth", 20, 64),
]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(got, want, rounding):
    """Weights of values are rounded to the cache's type, so an output is as exact as its row's numbers are large."""
    got, want = got.float(), want.float()
    assert not got.isnan().any()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    # Half a step each: of the weights, of this output and of the reference's.
    assert error.max() < 1.5 * rounding, f"relative error {error.max():.2e} at {error.argmax()}"
    torch.testing.assert_close(got, want, rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"{b[0]}-d{b[1]}-{b[2]}-{b[3]}-g{b[4]}-p{b[5]}")
def test_attend_and_observe_agree_with_the_reference(kernels, batch, last_thread_first):
    """Odd lengths, chunks, empty records, 1 to 20 query heads a KV head; all that must not be read is NaN."""
    cache, work, query = shared.serving_batch(*batch)
    scale = query.shape[-1] ** -0.5
    for corrected in (False, True):
        want, want_lse = shared.run_attend(reference, cache, query, work, scale, corrected)
        got, lse = shared.run_attend(kernels, cache, query, work, scale, corrected)
        assert_close(got, want, ROUNDING[query.dtype])
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    last_thread_first()
    again, _ = shared.run_attend(kernels, nhd(cache), query, work, scale, True)
    assert torch.equal(again, got), "bitwise, whichever thread runs first, and NHD like HND"
    want_mass, mass = (torch.full(cache.keys.shape[:3], 7.0) for _ in range(2))
    reference.observe(cache, Observed(want_mass), query, want_lse, work, scale)
    kernels.observe(cache, Observed(mass), query, want_lse, work, scale)
    used = torch.cat([row[row > 0] for row in work.pages])
    torch.testing.assert_close(mass[used], want_mass[used], rtol=1e-4, atol=1e-5)
    assert mass[0].eq(7).all()


def test_a_row_does_not_depend_on_its_batch(kernels):
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    together, _ = shared.run_attend(kernels, cache, query, work, 0.125, True)
    for row in range(len(work.last_slot)):
        alone = shared.attend_work(work.pages[row : row + 1], [int(work.last_slot[row])], [int(work.num_queries[row])])
        alone.moment_pages, alone.num_evicted = work.moment_pages[row : row + 1], work.num_evicted[row : row + 1]
        tokens = slice(int(work.first_token[row]), int(work.first_token[row] + work.num_queries[row]))
        output, _ = shared.run_attend(kernels, cache, query[tokens], alone, 0.125, True)
        assert torch.equal(output, together[tokens]), row


def test_the_first_order_step_is_limited_to_the_spread(kernels):
    """Values that follow their keys and far queries: without the limit the correction would leave the evicted values."""
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "float32", "first", 4)
    gone = torch.randn(len(work.last_slot), shared.HEADS, 64, 64, generator=torch.Generator().manual_seed(5))
    weight = torch.ones(gone.shape[:3])
    cache.write_moments(work.moment_pages, moments.of_tokens(gone, 3 * gone, weight, True))
    query = 8 * query
    unlimited = cache.read_moments(work.moment_pages, work.num_evicted)
    unlimited.value_spread *= 1e6
    grouped = query[: len(work.last_slot), None, :1].float().expand(-1, shared.HEADS, -1, -1)
    far, _ = moments.partial(unlimited, grouped, 0.125)
    near, _ = moments.partial(cache.read_moments(work.moment_pages, work.num_evicted), grouped, 0.125)
    assert (far - near).abs().max() > 1, "the limit acts here"
    want, _ = shared.run_attend(reference, cache, query, work, 0.125, True)
    got, _ = shared.run_attend(kernels, cache, query, work, 0.125, True)
    assert_close(got, want, ROUNDING[torch.bfloat16])


def test_rows_that_observe_nothing_read_nothing(kernels):
    """Most rows of most steps: their pages could lie anywhere. Others get what they got beside them."""
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "zeroth", 4)
    _, lse = shared.run_attend(reference, cache, query, work, 0.125, True)
    watched = torch.arange(len(work.num_queries)) % 2 == 0
    work.observe_from = torch.where(watched, 0, work.num_queries)
    work.restart = watched
    want = torch.zeros(cache.keys.shape[:3])
    reference.observe(cache, Observed(want), query, lse, work, 0.125)
    used = torch.cat([row[row > 0] for row in work.pages[watched]])
    work.pages[~watched] = 1 << 40
    mass = torch.zeros(cache.keys.shape[:3])
    kernels.observe(cache, Observed(mass), query, lse, work, 0.125)
    torch.testing.assert_close(mass[used], want[used], rtol=1e-4, atol=1e-5)


def test_padding_rows_are_not_touched(kernels):
    """A captured launch covers the largest batch: rows without queries are skipped, whatever their pages say."""
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "zeroth", 4)
    work.num_queries[[1, *range(3, len(work.num_queries))]] = 0
    work.pages[3:] = 1 << 40
    output = torch.full_like(query, math.nan)
    kernels.attend(cache, query, output, None, work, 0.125, True)
    untouched = output.isnan().flatten(1)
    assert untouched.all(1).tolist() == [False, True, False] + [True] * (len(query) - 3)
    assert not untouched[[0, 2]].any()
    retire = RetireWork(
        work.pages[:5, :1].contiguous(), work.pages[:5, 1:3].contiguous(), work.moment_pages[:5], work.num_evicted[:5]
    )
    retire.retiring_pages[:] = -1
    before = cache.kv.clone()
    score = torch.zeros(5, shared.HEADS, 3 * cache.page_size)
    kernels._consolidate(cache, torch.zeros(cache.keys.shape[:3]), retire, score, 0, 0.0)
    assert torch.equal(before.view(torch.int16), cache.kv.view(torch.int16))


RECORDS = [
    (torch.bfloat16, 128, "bfloat16"),
    (torch.float16, 64, "float32"),
    (torch.bfloat16, 64, "int8"),
    (torch.float16, 256, "bfloat16"),
    (torch.bfloat16, 256, "int8"),
]


@pytest.mark.parametrize("order", ["first thread first", "last thread first"])
@pytest.mark.parametrize("policy", ["momentkv", "random", "h2o", "expected_attention"])
@pytest.mark.parametrize(("dtype", "head_dim", "moment_dtype"), RECORDS)
def test_consolidation_agrees_with_the_reference(
    kernels, policy, dtype, head_dim, moment_dtype, order, last_thread_first
):
    """First events, whose moment pages are among the retiring ones, later events, rows that retire fewer pages."""
    if order == "last thread first":
        last_thread_first()
    test_consolidation_kernels.test_consolidation_agrees_with_the_reference(
        kernels, policy, dtype, head_dim, moment_dtype
    )


@pytest.mark.parametrize("has_covariance", [False, True])
def test_consolidation_repeats_to_the_bit_in_both_layouts(kernels, has_covariance, last_thread_first):
    cache = shared.poisoned_cache(20, 32, 128, torch.bfloat16, has_covariance=has_covariance)
    cache.kv[1:] = torch.randn(cache.kv[1:].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    mass = torch.rand(cache.keys.shape[:3], generator=torch.Generator().manual_seed(2))
    work = RetireWork(
        torch.tensor([[3, 9], [1, 2]]),
        torch.tensor([[5, 7, 4], [8, 6, -1]]),
        torch.tensor([[4, 7, 5], [11, 12, 10]]),
        torch.zeros(2),
    )
    twins = [(gpu_view(cache.kv.clone(), cache.record_layout), mass.clone()), (nhd(cache), mass.clone())]
    for twin, twin_mass in twins:
        kernels.consolidate(twin, Observed(twin_mass), work, find("momentkv")(), 4, 0.1)
        last_thread_first()
    (one, one_mass), (two, two_mass) = twins
    assert torch.equal(one.kv[1:].view(torch.int16), two.kv[1:].contiguous().view(torch.int16))
    assert torch.equal(one_mass, two_mass)


def test_equal_and_undefined_scores(kernels):
    """Of equal scores the earlier candidate stays, a NaN goes with the lowest; over more candidates than threads."""
    cache = shared.poisoned_cache(20, 32, 64, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    cache.kv[1:] = torch.randn(cache.kv[1:].shape, generator=generator).bfloat16()
    cache.keys[1:] = torch.randint(0, 2, (19, shared.HEADS, 32, 1), generator=generator).bfloat16() / 8
    cache.keys[2, :, 7], cache.keys[13, 1, 3] = math.nan, math.nan
    work = RetireWork(
        torch.arange(1, 11)[None], torch.arange(11, 15)[None], torch.tensor([[16, 17, 18]]), torch.tensor([9.0])
    )
    zeros = torch.zeros(1, shared.HEADS, 64)
    cache.write_moments(
        work.moment_pages,
        moments.Moments(work.num_evicted, zeros, zeros, zeros[..., 0], torch.zeros(1, shared.HEADS, 64, 64)),
    )
    mass = torch.zeros(cache.keys.shape[:3])
    twin = gpu_view(cache.kv.clone(), cache.record_layout)
    reference.consolidate(twin, Observed(mass.clone()), work, find("momentkv")(), 4, 0.1)
    kernels.consolidate(cache, Observed(mass), work, find("momentkv")(), 4, 0.1)
    for got, want in zip(cache.read_tokens(work.store_pages), twin.read_tokens(work.store_pages), strict=True):
        assert torch.equal(got, want) and not got.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_write_stores_tokens_and_clears_fresh_pages(kernels, dtype):
    test_attention_kernels.test_write_stores_tokens_and_clears_fresh_pages(kernels, dtype)


def test_operators_check_what_they_are_given(emulated):
    """A wrong tensor is an error that names it, what it is and what would be legal."""
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    output = torch.empty_like(query)
    cases = [
        (dict(output=output[:, :4]), r"output has shape \[.*, 4, 64\]"),
        (dict(query=query.float()), r"query is Float .* BFloat16 on cpu"),
        (dict(query=query[..., ::2].repeat(1, 1, 2).transpose(0, 1)), "query has shape .* strides"),
        (dict(cache=gpu_view(cache.kv.float(), cache.record_layout)), "keys is Float; the CUDA kernels know bfloat16 and float16"),
        (dict(cache=gpu_view(cache.kv[..., :64].contiguous(), cache.record_layout)), "head dimension 32 is none of 64, 128, 256"),
        (dict(cache=gpu_view(cache.kv[:, :, :8].contiguous(), cache.record_layout)), "page size 8 is not a multiple of 16"),
    ]  # fmt: skip
    for change, message in cases:
        given = dict(cache=cache, query=query, output=output, lse=None, work=work, scale=0.1, corrected=True) | change
        with pytest.raises(RuntimeError, match=message):
            emulated.attend(**given)
    moment_pages, work.moment_pages = work.moment_pages, work.moment_pages[:, :1].contiguous()
    with pytest.raises(RuntimeError, match="moment_pages has 1 pages of 4096 bytes a head; its record needs 8832"):
        emulated.attend(cache, query, output, None, work, 0.1, True)
    work.num_evicted = work.num_evicted.double()
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        emulated.attend(cache, query, output, None, work, 0.1, False)
    retire = RetireWork(
        work.pages[:, :1].contiguous(), work.pages[:, 1:2].contiguous(), moment_pages, work.last_slot.float()
    )
    with pytest.raises(RuntimeError, match=r"score has shape \[7, 2, 5\] instead of \[7, 2, 32\]"):
        emulated._consolidate(cache, None, retire, torch.zeros(7, 2, 5), 0, 0.1)


def test_another_device_is_only_a_copy_away(emulated):
    """What the GPU runs of these tests rely on, tried with the CPU as the other device."""
    test_consolidation_kernels.test_consolidation_agrees_with_the_reference(
        OnDevice(emulated, "cpu"), "momentkv", torch.bfloat16, 64, "int8"
    )
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    want, _ = shared.run_attend(emulated, nhd(cache), query, work, 0.1, True)
    got, _ = shared.run_attend(OnDevice(emulated, "cpu"), nhd(cache), query, work, 0.1, True)
    assert torch.equal(got, want)


def test_operators_declare_what_they_write(emulated):
    """The schemas' mutations are the real ones, and torch.compile can trace the operators (fake tensors)."""
    cache, work, query = shared.serving_batch(torch.bfloat16, 64, "bfloat16", "zeroth", 2)
    checks = ("test_schema", "test_faketensor")
    calls = []
    recorder = type("Recorder", (), {"__getattr__": lambda _, name: lambda *a: calls.append((name, a))})()
    module._ops = recorder  # undone by the fixture
    lse = torch.zeros(query.shape[:2])
    mass = torch.zeros(cache.keys.shape[:3])
    emulated.attend(cache, query, torch.empty_like(query), lse, work, 0.1, True)
    emulated.observe(cache, Observed(mass), query, lse, work, 0.1)
    retire = RetireWork(
        work.pages[:, :1].contiguous(), work.pages[:, 1:2].contiguous(), work.moment_pages, work.num_evicted
    )
    emulated.consolidate(cache, Observed(mass), retire, find("momentkv")(), 0, 0.1)
    emulated.write(cache, query[:3, :2], query[:3, 2:], torch.tensor([16, 17, 18]), Observed(mass))
    assert [name for name, _ in calls] == ["attend", "observe", "consolidate", "write"]
    for name, arguments in calls:
        operator = getattr(torch.ops.momentkv_cuda_emulated, name).default
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_the_family_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(module, "_why_missing", "No module named 'momentkv_vllm._cuda'")
    with pytest.raises(ValueError, match="'cuda' cannot run here: .*not built.*MOMENTKV_BUILD_CUDA=1"):
        select("cuda", "cuda")
    with pytest.raises(ValueError, match="does not run on 'cpu' tensors"):
        select("cuda", "cpu")
    monkeypatch.setattr(module, "_why_missing", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.objections() == ["no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, works in [((7, 5), False), ((8, 0), True), ((9, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert (not cuda.objections()) == works
