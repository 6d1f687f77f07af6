"""The score "key_direction" as kernels compute it: they keep what the specification keeps, of exact and quantised stores."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import HEADS, INTERPRETED

from momentkv_vllm import moments
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.in_torch import candidates
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.reference import chosen
from momentkv_vllm.kernels.worklists import RetireWork
from momentkv_vllm.key_centres import of_slots
from momentkv_vllm.packed_store import Packed, PackedLayout
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies.key_direction import key_direction

PAGE, STORE_PAGES, RETIRE, SINKS, ROWS = 16, 14, 2, 4, 3
EVICTED = torch.tensor([0.0, 300.0, 0.0])
"""A quantised store that first loses tokens, one that has lost some, and one whose pages are still exact."""
STORED, STORE_TOKENS = torch.tensor([232, 216, 0]), 232
EXACT = [(None, d, 1) for d in (16, 48, 64, 96, 128, 256)] + [(None, 64, 8)]
INT4 = [("int4", d, 1) for d in (16, 48, 64, 80, 96, 112, 128, 256)] + [("int4", 64, 8), ("int4", 128, 8)]
INT8 = [("int8", d, 1) for d in (32, 64, 80, 128, 256)] + [("int8", 64, 8)]


@dataclass
class Event:
    cache: CacheView
    mass: torch.Tensor
    work: RetireWork


def event(store_dtype, head_dim, run, dtype=torch.bfloat16, shift=0.0, nan=False) -> Event:
    """Three rows at an event, the last one with a page less to retire. `shift`: of one channel of all keys and values."""
    generator = torch.Generator().manual_seed(head_dim + run)
    record = RecordLayout(head_dim, has_covariance=False, has_centres=store_dtype is not None)
    num_moments = record.pages(PAGE, dtype.itemsize)
    pages = torch.randperm(ROWS * (STORE_PAGES + RETIRE + num_moments), generator=generator).view(ROWS, -1) + 1
    store, retiring, moment_pages = (x.contiguous() for x in pages.split([STORE_PAGES, RETIRE, num_moments], 1))
    kv = torch.randn(pages.numel() + 1, HEADS, PAGE, 2 * head_dim, generator=generator).to(dtype)
    kv[0] = math.nan
    layout = store_dtype and PackedLayout(store_dtype, head_dim)
    cache = CacheView.of_vllm_cpu(kv, record, layout)
    if shift:
        cache.keys[1:, :, :, 3] += shift
        cache.values[1:, :, :, 5] += shift / 10
    if layout:
        keys, values = torch.randn(
            2, ROWS, HEADS, STORE_PAGES * cache.packed.page_tokens, head_dim, generator=generator
        )
        keys[..., 3] += shift
        values[..., 5] += shift / 10
        if nan:
            keys[:, 0, 7, 2], values[:, 1, 9, 3] = math.nan, math.nan
        centres = torch.randn(ROWS, HEADS, 2, head_dim, generator=generator)
        centres[..., 3] += shift
        cache.write_centres(moment_pages, centres)
        keys -= of_slots(centres, keys.shape[2])
        for row in (0, 1):
            packed = Packed.of(keys[row : row + 1], values[row : row + 1], layout)
            cache.packed.write(store[row : row + 1], packed)
    if nan:
        cache.keys[retiring[:, 0], 0, 3, 1], cache.values[retiring[:, 0], 1, 5, 1] = math.nan, math.nan
    gone = (torch.randn(ROWS, HEADS, 40, head_dim, generator=generator) for _ in range(2))
    cache.write_moments(moment_pages, moments.of_tokens(*gone, torch.ones(ROWS, HEADS, 40), False))
    retiring[2, 1] = -1
    packed_work = {"stored": STORED, "store_tokens": STORE_TOKENS} if layout else {}
    mass = torch.rand(len(kv), HEADS, cache.page_slots, generator=generator)
    return Event(cache, mass, RetireWork(store, retiring, moment_pages, EVICTED, run, **packed_work))


def kept_by_specification(e: Event, weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(which candidates [rows, heads, tokens] stay, their mass, how far every one's run is from the edge between both)"""
    tokens = candidates(e.cache, Observed(e.mass), e.work, 1.0)
    score = key_direction(tokens, weight)
    run, sinks = e.work.run_tokens, SINKS
    kept = chosen(score, tokens.valid, tokens.store_tokens, run, sinks)
    runs = score.unflatten(-1, (-1, run)).mean(-1).repeat_interleave(run, -1)
    edge = runs.where(kept, math.inf)[..., -(-sinks // run) * run :].nan_to_num(nan=math.inf).amin(-1, keepdim=True)
    return kept, tokens.attention.where(tokens.valid.unsqueeze(1), -1.0), ((runs - edge) / edge).abs()


def kept_by_kernels(e: Event, mass_of: torch.Tensor, weight: float, family: str) -> torch.Tensor:
    """Likewise, told by the mass that has moved along."""
    mass = e.mass.clone()
    select(family)._consolidate(e.cache, mass, e.work, None, SINKS, weight)
    page_tokens = e.cache.packed.page_tokens if e.work.stored is not None else PAGE
    held = mass[e.work.store_pages][..., :page_tokens].transpose(1, 2).flatten(2, 3)
    held = held[:, :, : e.work.capacity(PAGE)]
    return (mass_of.unsqueeze(-1) == held.unsqueeze(2)).any(-1)


def compare(e: Event, weight: float, rounding: float, family: str = "cpu") -> None:
    want, mass, distance = kept_by_specification(e, weight)
    got = kept_by_kernels(e, mass, weight, family)
    assert torch.equal(got.sum(-1), want.sum(-1))
    assert (want.sum(-1) < (mass >= 0).sum(-1)).all(), "every row must evict"
    flipped = got != want
    assert not (flipped & ~(distance < rounding)).any(), (
        f"{flipped.sum()} flipped, up to {distance[flipped].max()} apart"
    )


@pytest.mark.parametrize("weight", [0.0, 0.25], ids=["direction", "both"])
@pytest.mark.parametrize("case", EXACT + INT4 + INT8, ids=str)
def test_cpu_keeps_what_the_specification_keeps(case, weight):
    compare(event(*case), weight, 1e-5 if case[0] is None else 3e-4)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
@pytest.mark.parametrize(
    ("family", "case", "weight"),
    [("triton", (None, 64, 1), 0.25), ("triton", ("int4", 80, 8), 0.25)],
    ids=str,
)
def test_interpreted_kernels_keep_what_the_specification_keeps(family, case, weight):
    compare(event(*case, nan=True), weight, 1e-5, family)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_cpu_scores_every_type_of_cache(dtype):
    for store, rounding in ((None, 1e-5), ("int4", 3e-4)):
        e = event(store, 64, 1, dtype)
        if dtype.itemsize == 1:
            e.cache.key_scale, e.cache.value_scale = 0.3, 2.5
        compare(e, 0.25, rounding)


@pytest.mark.parametrize("case", [(None, 64, 1), ("int4", 128, 8), ("int8", 64, 1)], ids=str)
def test_cpu_scores_keys_with_an_outlier_channel(case):
    """As biases of Qwen2.5 make them: all directions are nearly equal, and 1 - cos is what is left after cancellation."""
    compare(event(*case, shift=30.0), 0.25, 1e-2)


@pytest.mark.parametrize("case", [(None, 64, 1), ("int4", 64, 1), ("int4", 80, 8), ("int8", 64, 1)], ids=str)
def test_cpu_lets_undefined_tokens_go_first_and_decide_for_no_other(case):
    e = event(*case, nan=True)
    compare(e, 0.25, 1e-5 if case[0] is None else 3e-4)
    assert e.cache.read_moments(e.work.moment_pages, torch.ones(ROWS)).mean_key[:, 0].isnan().any(), "they have gone"


def test_cpu_names_what_its_score_lacks():
    e = event("int4", 64, 8)
    with pytest.raises(RuntimeError, match="row 0 evicts by a score with attention"):
        select("cpu")._consolidate(e.cache, None, e.work, None, SINKS, 0.25)
    e.work = replace(e.work, stored=torch.tensor([8, 8, 0]), store_tokens=320)
    select("cpu")._consolidate(e.cache, None, e.work, None, SINKS, 0.25)
