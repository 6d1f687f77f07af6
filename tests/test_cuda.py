"""The CUDA kernels without a GPU: their own source and operators, run on the CPU by csrc/cuda/emulate.h, against the
reference; and what nvcc makes of them for sm_80 and sm_90a."""

import math

import cuda_emulated
import pytest
import torch
from test_kernels import attend_work, run_attend, serving_batch

from momentkv_vllm.kernels import cuda, reference
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.page_layout import RecordLayout


def gpu_view(kv: torch.Tensor, record: RecordLayout) -> CacheView:
    """vLLM's GPU layout in logical order, [num_pages, heads, page_size, 2 * head_dim], a slot's key before its value."""
    d = kv.shape[-1] // 2
    return CacheView(kv[..., :d], kv[..., d:], kv, kv.view(*kv.shape[:2], -1).view(torch.uint8), record)


def nhd(cache: CacheView) -> CacheView:
    """A copy whose slots lie head beside head. The reference cannot write records there (`raw` is a copy)."""
    kv = cache.kv.transpose(1, 2).contiguous().transpose(1, 2)
    d = kv.shape[-1] // 2
    return CacheView(kv[..., :d], kv[..., d:], kv, cache.raw, cache.record)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if cuda_emulated.compiler() is None:
        pytest.skip("g++ is missing")
    torch.ops.load_library(cuda_emulated.build(tmp_path_factory.mktemp("cuda_emulated")))
    cuda.register_fakes("momentkv_cuda_emulated")


@pytest.fixture
def emulated(library, monkeypatch):
    """The family `cuda` on CPU tensors."""
    monkeypatch.setattr(CacheView, "of_vllm_cpu", staticmethod(gpu_view))
    monkeypatch.setattr(cuda, "_ops", torch.ops.momentkv_cuda_emulated)
    return cuda


ATTEND = [
    (torch.bfloat16, 128, "bfloat16", "first", 4, 16),
    (torch.float16, 64, "float32", "first", 3, 32),
    (torch.bfloat16, 64, "int8", "first", 8, 16),
    (torch.float16, 128, "int8", "first", 1, 128),
    (torch.bfloat16, 256, "bfloat16", "zeroth", 7, 48),
    (torch.float16, 256, "float32", "first", 2, 16),
    (torch.bfloat16, 128, "bfloat16", "zeroth", 20, 64),
]


def assert_close(got, want, rounding):
    """Weights of values are rounded to the cache's type, so an output is as exact as its row's numbers are large."""
    got, want = got.float(), want.float()
    assert not got.isnan().any()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() < rounding, f"relative error {error.max():.2e} at {error.argmax()}"
    torch.testing.assert_close(got, want, rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.parametrize("batch", ATTEND, ids=lambda b: f"{b[0]}-d{b[1]}-{b[2]}-{b[3]}-g{b[4]}-p{b[5]}")
def test_attend_agrees_with_the_reference(emulated, batch, monkeypatch):
    """Odd lengths, chunks, empty records, 1 to 20 query heads a KV head; all that must not be read is NaN."""
    cache, work, query = serving_batch(*batch)
    scale = query.shape[-1] ** -0.5
    for correct in (False, True):
        want, want_lse = run_attend(reference, cache, query, work, scale, correct)
        got, lse = run_attend(emulated, cache, query, work, scale, correct)
        assert_close(got, want, {torch.bfloat16: 2**-8, torch.float16: 2**-11}[query.dtype])
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    monkeypatch.setenv("MOMENTKV_EMULATE_REVERSE", "1")
    again, _ = run_attend(emulated, nhd(cache), query, work, scale, True)
    assert torch.equal(again, got), "bitwise, whichever thread runs first, and NHD like HND"


def test_a_row_does_not_depend_on_its_batch(emulated):
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    together, _ = run_attend(emulated, cache, query, work, 0.125, True)
    for row in range(len(work.last)):
        alone = attend_work(work.pages[row : row + 1], [int(work.last[row])], [int(work.queries[row])])
        alone.moment_pages, alone.count = work.moment_pages[row : row + 1], work.count[row : row + 1]
        tokens = slice(int(work.first_token[row]), int(work.first_token[row] + work.queries[row]))
        output, _ = run_attend(emulated, cache, query[tokens], alone, 0.125, True)
        assert torch.equal(output, together[tokens]), row


def test_rows_beyond_the_count_are_not_touched(emulated):
    """A captured launch covers the largest batch; a device counter says how many rows are real, padding has no queries."""
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "zeroth", 4)
    work.queries[1] = 0
    work.pages[3:] = 1 << 40
    output = torch.full_like(query, math.nan)
    emulated.attend(cache, query, output, None, work, 0.125, True, num_rows=torch.tensor([3], dtype=torch.int32))
    assert output.isnan().all(-1).all(-1).tolist() == [False, True, False] + [True] * (len(query) - 3)
