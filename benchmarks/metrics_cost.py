"""What the metrics cost, in CPU time of one thread, beside the decode attention that they accompany."""

import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import report
import torch
from benchmark import Benchmark
from kernels.cases import Case, Shape

from momentkv_vllm.attention.monitor import SAMPLE_EVERY, Attended, Monitor
from momentkv_vllm.block_manager.class_books import ClassBooks
from momentkv_vllm.block_manager.metrics import PageMetrics
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import METRICS_DIR
from momentkv_vllm.kernels import select
from momentkv_vllm.metrics import CONSOLIDATE_SECONDS
from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_schedule import PageSchedule

PLAN = PageSchedule(page_size=16, store_pages=31, moment_pages=1, window_pages=32, retire_pages=2)
"""The default at a budget of 1,024 tokens."""


def microseconds(call: Callable[[], None], calls: int) -> float:
    """Median over 9 rounds of the mean CPU time of `calls` calls."""

    def once() -> float:
        start = time.thread_time()
        for _ in range(calls):
            call()
        return (time.thread_time() - start) / calls * 1e6

    call()
    return statistics.median(once() for _ in range(9))


def measure(_: Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        METRICS_DIR.set(folder)
        blocks, config = PageBlocks(PLAN), EvictionConfig("momentkv", 1024)
        spec = SimpleNamespace(
            model_name="m", engine=0, schedule=PLAN, schedules=[PLAN], blocks=blocks, blocks_of=PageBlocks,
            splits_blocks=False, page_bytes=1 << 20, config=config, observes_attention=True, step_tokens=256,
        )  # fmt: skip
        books = ClassBooks.of(spec, 0)
        books.retired, books.evicted, books.sequences, books.evicting = 9, 100, 8, 4
        monitor, pages, case = (
            Monitor(spec),
            PageMetrics(spec, 4096),
            Case(Shape(slots=PLAN.first_event_tokens, kv_heads=8)),
        )

        def change_pages() -> None:
            books.live += 1
            pages.holdings([books])

        lse = torch.empty(case.query.shape[:2])
        select("cpu").attend(case.cache, case.query, case.output, lse, case.work, case.scale, True)
        attended = Attended(case.cache, case.query, case.output, lse, case.work, case.scale, True)
        cost = {
            "pages_changed": microseconds(change_pages, 5000),
            "pages_retired": microseconds(lambda: pages.retired(0, 2, 32), 5000),
            "consolidation_timed": microseconds(lambda: monitor.metrics.observe(CONSOLIDATE_SECONDS, 1e-3), 5000),
            "sample": microseconds(lambda: monitor.sample(attended), 50),
            "attention_a_token": microseconds(lambda: case.attend(True), 50) / case.shape.rows,
        }
    visit = cost["consolidation_timed"] + cost["sample"] / SAMPLE_EVERY
    share = visit / PLAN.retire_tokens / cost["attention_a_token"]
    return {"microseconds": cost, "visit_microseconds": visit, "share_of_attention": share}


def tables(found: dict[str, Any]) -> list[list[list]]:
    return [
        [["", "us"], *found["microseconds"].items(), ("a layer visit with an eviction", found["visit_microseconds"])]
    ]


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [report.target("share of decode attention", found["share_of_attention"], 0.005, at_least=False)]


BENCHMARK = Benchmark("metrics_cost", measure, tables, targets)

if __name__ == "__main__":
    BENCHMARK.run()
