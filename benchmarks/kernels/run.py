"""`make bench NAME=kernels`: the C++ kernels against vLLM's own on the same tokens, in one run.

Correctness first; then medians of interleaved repeats, caches flushed before every call (between two layers a server reads
weights). Ratios are what counts: the machine is shared.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import report
import torch
from benchmark import Benchmark
from kernels.cases import CPU, Case, Shape
from tqdm import tqdm
from vllm.platforms import current_platform

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import select
from momentkv_vllm.page_schedule import DEFAULT_RETIRE_SHARE

REPEATS = 25
SHAPES = [
    *(Shape(rows=rows) for rows in (1, 8, 32)),
    *(Shape(head_dim=64, rows=rows) for rows in (1, 8, 32)),
    *(Shape(groups=groups) for groups in (1, 8)),
    Shape(slots=4096, rows=4, page_size=32),
    Shape(rows=8, record="bfloat16"),
    Shape(rows=4, queries=16),
    Shape(head_dim=64, rows=4, queries=32, page_size=32),
]
MAIN = Shape(rows=8)
CONTEXTS = (4096, 8192, 32768)
BUDGETS = (512, 1024, 2048, 4096)
_flush = torch.empty(96 << 20, dtype=torch.uint8)


def seconds(call: Callable[[], None], flush: bool = True) -> float:
    if flush:
        _flush.add_(1)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(t) for name, t in times.items()}


def check(shape: Shape) -> None:
    """No figure without a right answer. Raises AssertionError."""
    case = Case(shape)
    stock = case.vllm_attend()
    stock()
    want = case.output.clone()
    case.attend(False)
    torch.testing.assert_close(case.output, want, rtol=2**-5, atol=2**-7)
    case.attend(True)
    ours = case.output.clone()
    case.attend(True, select("reference"))
    torch.testing.assert_close(ours, case.output, rtol=2**-6, atol=2**-8)


def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory: the ceiling of every decode kernel here."""
    block = torch.ones(256 << 20, dtype=torch.uint8).view(torch.float32)
    return block.nbytes / statistics.median(seconds(block.sum, flush=False) for _ in range(9))


def measure_attend(shape: Shape, bandwidth: float) -> dict[str, Any]:
    case = Case(shape)
    t = interleaved(
        {"vllm": case.vllm_attend(), "attend": lambda: case.attend(False), "corrected": lambda: case.attend(True)}
    )
    return {
        "shape": shape.label,
        "attend_to_vllm": t["attend"] / t["vllm"],
        "corrected_to_attend": t["corrected"] / t["attend"],
        "record_bytes_to_kv_bytes": shape.record_bytes / shape.kv_bytes,
        "bandwidth_share": shape.kv_bytes / t["attend"] / bandwidth,
        "vllm_bandwidth_share": shape.kv_bytes / t["vllm"] / bandwidth,
        "attend_seconds": t["attend"],
    }


def measure_context(context: int) -> dict[str, Any]:
    """Full attention over the context (vLLM's kernel, its default page size) against 1,024 corrected tokens."""
    full, kept = Case(Shape(rows=4, slots=context, page_size=128)), Case(Shape(rows=4))
    t = interleaved({"full": full.vllm_attend(), "kept": lambda: kept.attend(True)})
    bound = full.shape.kv_bytes / (kept.shape.kv_bytes + kept.shape.record_bytes)
    speedup = t["full"] / t["kept"]
    return {"context": context, "speedup": speedup, "bytes_bound": bound, "of_bound": speedup / bound}


def measure_retire(budget: int) -> dict[str, Any]:
    """Shares of decode attention, amortised: every row retires `retire_tokens` at once, every so many steps, and observes the
    attention of some of the queries between."""
    page_size, rows = (16 if budget <= 1024 else 32), 16
    retire_pages = max(1, budget // DEFAULT_RETIRE_SHARE // page_size)
    retire_tokens, queries = retire_pages * page_size, EvictionConfig().observation_tokens
    case = Case(Shape(slots=budget, rows=rows, page_size=page_size))
    observed = case.observe_work()
    attend, retire, attend_and_observe = [], [], []
    for turn in range(3 * rows):
        work = case.retire_work(turn % rows, retire_pages)  # built once a step for all layers, so not timed
        attend.append(seconds(lambda: case.attend(True)))
        retire.append(seconds(lambda: case.retire(work), flush=False))  # noqa: B023  called at once
        attend_and_observe.append(seconds(lambda: case.attend_and_observe(observed)))
    step = statistics.median(attend[rows:])
    tokens = statistics.median(retire[rows:]) / step * rows
    observing = statistics.median(b / a - 1 for a, b in zip(attend[rows:], attend_and_observe[rows:], strict=True))
    return {
        "budget": budget,
        "retire_tokens": retire_tokens,
        "event_in_decode_tokens": tokens,
        "share_of_attend": tokens / retire_tokens,
        "observed_query_in_decode_tokens": observing,
        # `queries` of every `retire_tokens` steps of a sequence are observed.
        "observing_share_of_attend": observing * queries / retire_tokens,
    }


def draw(results: dict[str, Any], axes: Any) -> None:
    (left, right), attends, contexts = axes, results["attend"], results["context"]
    y = range(len(attends))
    left.barh([i + 0.2 for i in y], [a["attend_to_vllm"] for a in attends], 0.4, label="attend")
    corrected = [a["attend_to_vllm"] * a["corrected_to_attend"] for a in attends]
    left.barh([i - 0.2 for i in y], corrected, 0.4, label="with the correction")
    left.axvline(1, color="black", lw=1)
    left.set_yticks(list(y), [a["shape"] for a in attends], fontsize=7)
    left.set_xlabel("time / vLLM's kernel on the same tokens")
    left.legend(fontsize=8)
    x = [c["context"] for c in contexts]
    right.plot(x, [c["bytes_bound"] for c in contexts], "k--", label="bytes bound")
    right.plot(x, [c["speedup"] for c in contexts], "o-", label="measured")
    right.set(xscale="log", yscale="log", xlabel="context", ylabel="speed-up of decode attention, budget 1024")
    right.set_xticks(x, [f"{c // 1024}K" for c in x])
    right.legend(fontsize=8)


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    attends, retires, contexts = (results[name] for name in ("attend", "retire", "context"))
    main = next(a for a in attends if a["shape"] == MAIN.label)
    worst = max(a["attend_to_vllm"] for a in attends)
    return [
        report.target("worst attend / vLLM's kernel", worst, 1.0, at_least=False),
        report.target("corrected / attend at 1024, d=128", main["corrected_to_attend"], 1.10, at_least=False),
        report.target(
            "retiring / decode attention at 1024",
            next(r["share_of_attend"] for r in retires if r["budget"] == 1024),
            0.05,
            at_least=False,
        ),
        report.target("least attention speed-up / bytes bound", min(c["of_bound"] for c in contexts), 0.9),
    ]


def gate() -> None:
    current_platform.import_kernels()
    for shape in tqdm(SHAPES, desc="check"):
        check(shape)


def measure(_: Namespace) -> dict[str, Any]:
    bandwidth = read_bandwidth()
    return {
        "isa": CPU.isa(),
        "threads": torch.get_num_threads(),
        "read_bytes_per_second": bandwidth,
        "attend": [measure_attend(shape, bandwidth) for shape in tqdm(SHAPES, desc="attend")],
        "context": [measure_context(context) for context in tqdm(CONTEXTS, desc="context")],
        "retire": [measure_retire(budget) for budget in tqdm(BUDGETS, desc="retire")],
    }


def tables(results: dict[str, Any]) -> list[list[list]]:
    keys = ("shape", "attend_to_vllm", "corrected_to_attend", "bandwidth_share", "vllm_bandwidth_share")
    machine = [results["isa"], results["threads"], results["read_bytes_per_second"] / 1e9]
    return [
        [["instruction set", "threads", "memory reads, GB/s"], machine],
        report.rows_of(results["attend"], *keys),
        *(report.rows_of(results[section]) for section in ("context", "retire")),
    ]


BENCHMARK = Benchmark("kernels", measure, tables, targets, draw, panels=2, size=(12, 4.5), gate=gate)

if __name__ == "__main__":
    BENCHMARK.run()
