"""`make bench NAME=first_token`: time to the first token of one prompt over stock's, each engine in a process of its own.

Of the random-weight Llama, and of the real model where there is one: attention takes most of the time in layers as small as its
own. What stock takes depends on the CPU: where there is AMX, its attention is on it.
"""

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import report
from benchmark import Benchmark
from real_model import folder as real_model
from serving import model
from serving.run import EVICTION, measure
from tqdm import tqdm

from momentkv_vllm.kernels import select

RANDOM, REAL = "random weights", "SmolLM2-135M"
COARSE = 512
KINDS = {"stock": None, "momentkv": EVICTION, "coarse": EVICTION | {"prefill_retire_tokens": COARSE}}
REPEATS, LONG = 2, 8192
"""A prompt shorter than LONG is read twice each time, and the better counts: the first of a length may wait for memory."""


def measure_models(args: Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, tqdm(desc="engines") as bar:
        models = {RANDOM: (model.make(Path(folder), 128), [2048] if args.quick else [2048, 8192, 32768])}
        if (real := real_model.find()) is not None:
            models[REAL] = real, [2048] if args.quick else [512, 1024, 2048, 4096, 6000, 8000]
        return [
            {"model": name, "kernels": select("cpu").label(), "context": context, **ratios}
            for name, (path, contexts) in models.items()
            for context, ratios in zip(contexts, over_stock(path, contexts, args.quick, bar), strict=True)
        ]


def over_stock(path: Path, contexts: list[int], quick: bool, bar: tqdm) -> list[dict[str, float]]:
    """By context and kind but stock: seconds over stock's of the same repeat, the median of all repeats."""
    times: dict[str, list[list[float]]] = {name: [] for name in KINDS}
    for _ in range(1 if quick else REPEATS):
        for name, eviction in KINDS.items():
            cells = [[c, 1] for c in contexts for _ in range(1 if c >= LONG else 2)]
            found = measure(path, eviction, "ttft", cells=cells)
            times[name].append([min(r["seconds"] for r in found if r["context"] == c) for c in contexts])
            bar.update()
    ours = [name for name in KINDS if name != "stock"]
    return [
        {
            name: statistics.median(a[i] / b[i] for a, b in zip(times[name], times["stock"], strict=True))
            for name in ours
        }
        for i in range(len(contexts))
    ]


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most this share of stock's time; of the real model never more than stock's."""
    by = {(r["model"], r["context"]): r["momentkv"] for r in rows}
    limits = {(RANDOM, 8192): 0.5, (RANDOM, 32768): 0.5, (REAL, 6000): 0.7}
    found = [
        report.target(f"{m}, {c:,} tokens", by[m, c], limit, False) for (m, c), limit in limits.items() if (m, c) in by
    ]
    if real := [ratio for (name, _), ratio in by.items() if name == REAL]:
        found.append(report.target(f"{REAL}, the worst", max(real), 1.0, False))
    return found


def tables(rows: list[dict[str, Any]]) -> list[list[list]]:
    return [report.rows_of(rows)]


BENCHMARK = Benchmark("first_token", measure_models, tables, targets, quick=True)

if __name__ == "__main__":
    BENCHMARK.run()
