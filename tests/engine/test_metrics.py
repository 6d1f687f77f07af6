"""The metrics themselves: what a writer leaves for /metrics, what the block manager counts, what a worker samples."""

import pytest
import torch
from engine import random_prompt
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from momentkv_vllm.attention.monitor import Attended, measure
from momentkv_vllm.environment import METRICS_DIR
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork
from momentkv_vllm.metrics import (
    BUDGET_PAGES,
    CONSOLIDATE_SECONDS,
    CORRECTION,
    EVICTED_MASS,
    EVICTED_TOKENS,
    FREED_BYTES,
    HELD_TOKENS,
    LIVE_PAGES,
    METRICS,
    POOL_PAGES,
    RETIRED_PAGES,
    SEQUENCES,
    STOCK_PAGES,
    TOKENS,
    WORKER_METRICS,
    MetricWriter,
)
from momentkv_vllm.page_layout import RecordLayout


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(METRICS_DIR.name, str(tmp_path))
    return tmp_path


def shown(directory) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    lines = generate_latest(registry).decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_names_follow_prometheus_conventions():
    for metric in METRICS:
        assert metric.name.startswith("momentkv:") and not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.kind in ("counter", "gauge", "histogram") and metric.help.endswith(".")
        assert bool(metric.bounds) == (metric.kind == "histogram") and list(metric.bounds) == sorted(metric.bounds)
    assert len({m.name for m in METRICS}) == len(METRICS)


def test_a_histogram_shows_as_one(directory):
    writer = MetricWriter(WORKER_METRICS, "m", 3)
    for seconds in (5e-6, 1e-5, 2e-5, 0.5):  # a bound belongs to its bucket
        writer.observe(CONSOLIDATE_SECONDS, seconds)
    found = shown(directory)
    labels = 'engine="3",model_name="m"'
    buckets = {
        k.split('le="')[1].split('"')[0]: v
        for k, v in found.items()
        if k.startswith("momentkv:consolidate_seconds_bucket")
    }
    assert buckets["1e-05"] == 2 and buckets["3e-05"] == 3 and buckets["0.3"] == 3 and buckets["+Inf"] == 4
    assert found[f"momentkv:consolidate_seconds_count{{{labels}}}"] == 4
    assert found[f"momentkv:consolidate_seconds_sum{{{labels}}}"] == pytest.approx(0.500035)
    assert found[f"momentkv:evicted_mass_ratio_count{{{labels}}}"] == 0


def test_gauges_of_an_earlier_run_in_the_same_directory_do_not_add_up(directory):
    MetricWriter([POOL_PAGES], "m", 0).set(POOL_PAGES, 100)
    (old,) = directory.iterdir()
    old.rename(directory / "gauge_mostrecent_momentkv-1.db")
    MetricWriter([POOL_PAGES], "m", 0).set(POOL_PAGES, 70)
    assert list(shown(directory).values()) == [70]


@pytest.mark.engine
def test_the_books_in_an_engine(engine):
    """One sequence below its budget and one far beyond, observed while both run and after."""
    e = engine(policy="momentkv", budget_tokens=256, block_size=16)
    e.add(random_prompt(60), 24)
    e.add(random_prompt(1000), 24)
    seen = []

    def look(step):
        values = dict(e.manager.metrics.values)
        if values[SEQUENCES, 0] == values[SEQUENCES, 1] == 1:
            seen.append(values)

    e.run(look)
    plan = e.manager.schedule
    assert seen
    for v in seen:
        assert (v[LIVE_PAGES, 0], v[LIVE_PAGES, 1]) == (plan.store_pages, plan.moment_pages)
        assert sum(v[LIVE_PAGES, i] for i in range(3)) + v[RETIRED_PAGES, 0] == v[STOCK_PAGES, 0]
        assert v[TOKENS, 1] == v[EVICTED_TOKENS, 0] and v[TOKENS, 0] + v[TOKENS, 1] == 16 * v[STOCK_PAGES, 0]
    assert seen[-1][STOCK_PAGES, 0] in range(63 + 4, 64 + 7)
    end = e.manager.metrics.values
    layers, kv_heads, head_dim, k_and_v, float32 = 2, 2, 32, 2, 4
    assert end[FREED_BYTES, 0] == end[RETIRED_PAGES, 0] * 16 * layers * kv_heads * head_dim * k_and_v * float32 > 0
    assert (
        end[EVICTED_TOKENS, 0] > 700 and end[BUDGET_PAGES, 0] == 16 and end[POOL_PAGES, 0] == e.pool.num_gpu_blocks - 1
    )
    assert not any(
        end[m, i] for m in (LIVE_PAGES, SEQUENCES, TOKENS, STOCK_PAGES) for i in range(len(m.label_values) or 1)
    )


@pytest.mark.engine
def test_tokens_of_a_quantised_store(engine):
    """A store of 776 tokens and a window of two pages, in the memory of 256: the 77th page starts after the event at 1,216."""
    e = engine(policy="momentkv", budget_tokens=256, block_size=16, store_dtype="int8", max_num_batched_tokens=100)
    e.add(random_prompt(1200), 20)
    held = []
    e.run(lambda step: held.append([e.manager.metrics.values[TOKENS, i] for i in range(2)]))
    assert held[0] == [112, 0] and held[-2] == [776 + 32, 1216 - 16 - 776] and held[-1] == [0, 0]
    assert e.manager.metrics.values[HELD_TOKENS, 0] == 776 + 32


@pytest.mark.engine
@pytest.mark.parametrize("correction", ["zeroth", "off"])
def test_a_worker_times_and_samples(engine, correction):
    e = engine(policy="momentkv", budget_tokens=256, block_size=16, correction=correction)
    e.generate([random_prompt(1800, seed=s) for s in range(2)], 8)
    worker = e.vllm.engine_core.engine_core.model_executor.driver_worker.worker
    (builder,) = worker.model_runner.attn_groups[0][0].metadata_builders
    values = builder.monitor.metrics.values

    def histogram(metric):
        size = len(metric.bounds) + 1
        return sum(values[metric, i] for i in range(size)), values[metric, size]

    count, seconds = histogram(CONSOLIDATE_SECONDS)
    events = 2 * ((1800 - 256) // 16 + 1) * 2  # sequences x events x layers
    assert events / 2 <= count <= events and 0 < seconds < 60
    samples, mass = histogram(EVICTED_MASS)
    assert samples > 0 and 0 < mass < samples
    assert histogram(CORRECTION)[0] == (samples if correction == "zeroth" else 0)


@pytest.mark.parametrize("covariance", [False, True])
def test_measured_mass_and_correction_are_those_of_the_reference_kernel(covariance):
    torch.manual_seed(0)
    heads, groups, d, page = 2, 2, 32, 16
    record = RecordLayout(d, "float32", has_means=True, has_covariance=covariance)
    kv = torch.randn(12, heads, page, 2 * d)
    cache = CacheView.of_vllm_cpu(kv, record)
    moment_pages = torch.arange(8, 8 + record.pages(page, 4)).expand(2, -1) - torch.tensor([[0], [4]])
    work = AttendWork(
        first_token=torch.tensor([0, 1]), num_queries=torch.tensor([1, 1]), pages=torch.tensor([[1, 2], [3, 0]]),
        last_slot=torch.tensor([31, 9]), moment_pages=moment_pages, num_evicted=torch.tensor([40.0, 7.0]),
    )  # fmt: skip
    query, scale = torch.randn(2, heads * groups, d), d**-0.5
    results = {}
    for corrected in (False, True):
        output, lse = torch.empty_like(query), torch.empty(2, heads * groups)
        select("reference").attend(cache, query, output, lse, work, scale, corrected)
        results[corrected] = output, lse
    (plain, plain_lse), (merged, merged_lse) = results[False], results[True]
    rows = torch.arange(2)
    mass, change = measure(Attended(cache, query, merged, merged_lse, work, scale, True), rows)
    torch.testing.assert_close(mass, (1 - (plain_lse - merged_lse).exp()).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        change, (merged - plain).flatten(1).norm(dim=1) / merged.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4
    )
    uncorrected, _ = measure(Attended(cache, query, plain, plain_lse, work, scale, False), rows)
    torch.testing.assert_close(uncorrected, mass, rtol=1e-4, atol=1e-5)
