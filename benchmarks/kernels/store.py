"""Attention over a quantised store against 16-bit stores of as many bytes and of as many tokens, and what events and observed
queries add to it (`make bench NAME=store`).

Correctness first; then medians of interleaved repeats, caches flushed before every call. Ratios are what counts.
"""

import statistics
from argparse import Namespace
from dataclasses import replace
from typing import Any

import report
import torch
from benchmark import Benchmark
from kernels.cases import CPU, Case, Shape
from kernels.run import interleaved, seconds
from kernels.store_cases import BUDGET, WINDOW, StoreCase
from tqdm import tqdm

from momentkv_vllm.kernels import select
from momentkv_vllm.page_schedule import DEFAULT_RETIRE_SHARE

SHAPES = [
    *(Shape(rows=rows) for rows in (1, 8, 32)),
    *(Shape(head_dim=64, rows=rows) for rows in (1, 8, 32)),
    *(Shape(groups=groups) for groups in (1, 8)),
    Shape(rows=4, queries=16),
]
RETIRE_TOKENS = BUDGET // DEFAULT_RETIRE_SHARE
ROWS = 16
REPEATS = 48


def check(case: StoreCase) -> None:
    """No figure without a right answer. Raises AssertionError."""
    case.attend(True)
    ours = case.output.clone()
    case.attend(True, select("reference"))
    torch.testing.assert_close(ours, case.output, rtol=2**-5, atol=2**-7)


def measure_attend(shape: Shape, dtype: str) -> dict[str, Any]:
    store = StoreCase(shape, dtype)
    check(store)
    bytes_, tokens = Case(replace(shape, slots=BUDGET)), Case(replace(shape, slots=store.tokens + WINDOW))
    t = interleaved(
        {name: (lambda c=c: c.attend(True)) for name, c in (("store", store), ("b", bytes_), ("t", tokens))}
    )
    return {
        "shape": replace(shape, slots=BUDGET).label, "store_dtype": dtype, "tokens": store.tokens + WINDOW,
        "to_same_bytes": t["store"] / t["b"], "to_same_tokens": t["store"] / t["t"],
    }  # fmt: skip


def case_of(dtype: str, head_dim: int) -> Case:
    shape = Shape(head_dim=head_dim, rows=ROWS, slots=BUDGET)
    return Case(shape) if dtype == "model" else StoreCase(shape, dtype)


def check_event(dtype: str, head_dim: int) -> None:
    """Both families store the same. Raises AssertionError."""
    ours, theirs = (case_of(dtype, head_dim) for _ in range(2))
    theirs.cache.kv.copy_(ours.cache.kv)
    theirs.observed.data.copy_(ours.observed.data)
    for case, family in ((ours, CPU), (theirs, select("reference"))):
        case.retire(case.retire_work(0, RETIRE_TOKENS // case.shape.page_size), family)
    page = ours.pages[0, : BUDGET // 2 // ours.shape.page_size]
    same = (ours.cache.kv[page].view(torch.int16) == theirs.cache.kv[page].view(torch.int16)).float().mean()
    # A rank that flips between near equals changes a run.
    assert same > 0.99, f"the families' stores agree in {same:.2%}"


def measure_events(dtype: str, head_dim: int) -> dict[str, Any]:
    """Shares of decode attention: of retiring RETIRE_TOKENS once per so many steps, of observing every query."""
    check_event(dtype, head_dim)
    case = case_of(dtype, head_dim)
    observed = case.observe_work()
    attend, retire, observing = [], [], []
    for turn in range(REPEATS):
        work = case.retire_work(turn % ROWS, RETIRE_TOKENS // case.shape.page_size)
        attend.append(seconds(lambda: case.attend(True)))
        retire.append(seconds(lambda: case.retire(work), flush=False))  # noqa: B023  called at once
        both = seconds(lambda: case.attend_and_observe(observed))
        observing.append(both / attend[-1] - 1)
    event = statistics.median(retire[ROWS:]) / statistics.median(attend[ROWS:]) * ROWS
    return {
        "store_dtype": dtype, "head_dim": head_dim, "event_in_decode_tokens": event,
        "retiring_share": event / RETIRE_TOKENS, "observing_share": statistics.median(observing[ROWS:]),
    }  # fmt: skip


def measure(_: Namespace) -> dict[str, Any]:
    settings = [(dtype, d) for dtype in ("int4", "int8", "model") for d in (64, 128)]
    events = [measure_events(*one) for one in tqdm(settings, desc="events")]
    rows = [measure_attend(shape, dtype) for dtype in ("int8", "int4") for shape in tqdm(SHAPES, desc=dtype)]
    return {"kernels": CPU.label(), "attend": rows, "events": events}


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        report.target(
            f"{name} / decode attention, {e['store_dtype']}, d={e['head_dim']}", e[key], limit, at_least=False
        )
        for name, key, limit in (("retiring", "retiring_share", 0.04), ("observing", "observing_share", 0.1))
        for e in results["events"]
        if e["store_dtype"] != "int8"
    ]


def draw(results: dict[str, Any], axes: Any) -> None:
    for axis, dtype in zip(axes, ("int4", "int8"), strict=True):
        rows = [r for r in results["attend"] if r["store_dtype"] == dtype]
        for shift, key in ((0.2, "to_same_bytes"), (-0.2, "to_same_tokens")):
            label = key.removeprefix("to_").replace("_", " ")
            axis.barh([place + shift for place in range(len(rows))], [r[key] for r in rows], 0.4, label=label)
        axis.axvline(1, color="black", lw=1)
        names = [r["shape"] for r in rows] if axis is axes[0] else []
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xlabel(f"attention over an {dtype} store / over 16 bits")
    axes[0].legend(fontsize=8, loc="lower right")


BENCHMARK = Benchmark(
    "store", measure, lambda results: [report.rows_of(results[s]) for s in ("attend", "events")], targets, draw, panels=2,
    size=(13, 4.5),
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
