"""`make bench NAME=serving`: stock vLLM against momentkv on one machine in one run. About 15 minutes; `--quick` about 4.

Beside every speed-up stands its bytes bound: weights plus KV that a stock decode step reads, over weights plus retained KV and
records. Stock and momentkv take turns, each engine in a process of its own. `--only SECTION` measures one section again.
"""

import os
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import child
import report
import torch
from benchmark import Benchmark
from serving import model
from serving.model import POOL_NEW, POOL_PROMPT, POOL_TOKENS
from tqdm import tqdm

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout

BUDGET, POOL_BUDGET, STOCK_PAGE, OUR_PAGE = 1024, 512, 128, 16
POOL_GIB = 9
EVICTION = {"policy": "momentkv", "budget_tokens": BUDGET}
STEPS, CYCLES, LONG_STEPS = 24, 3, 250
UNDER_BUDGET = {"policy": "momentkv", "budget_tokens": 2048}


def measure(
    path: Path, eviction: dict | None, kind: str, plugins: str | None = None, gib: int = POOL_GIB, **task: Any
) -> list[dict]:
    """Results of one engine process. `plugins` "" keeps vLLM from loading us at all."""
    # All cores: vLLM's automatic binding leaves one out.
    every_core = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}"}
    environment = every_core | {"VLLM_CPU_KVCACHE_SPACE": str(gib)}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    task |= {"model": str(path), "eviction": eviction, "kind": kind}
    return list(child.results("serving.measure", task, **environment))


def layout(budget: int, head_dim: int) -> StateLayout:
    """The default's."""
    config = EvictionConfig(policy="momentkv", budget_tokens=budget)
    return StateLayout.of(config, OUR_PAGE, head_dim, torch.bfloat16)


def bytes_bound(head_dim: int, context: int, batch: int) -> float:
    """Speed-up of a decode step if time were bytes read."""
    plan, weights = layout(BUDGET, head_dim).schedule, model.weight_bytes(head_dim)
    retained = BUDGET - plan.moment_pages * OUR_PAGE - plan.retire_tokens / 2  # the window's fill, on average
    records = model.LAYERS * model.KV_HEADS * layout(BUDGET, head_dim).record.num_bytes
    ours = weights + batch * (retained * model.token_bytes(head_dim) + records)
    return (weights + batch * context * model.token_bytes(head_dim)) / ours


def cells(head_dim: int, quick: bool) -> tuple[list[list[int]], list[list[int]]]:
    """(context, batch) that fit the pool of stock, and those that do not."""
    contexts, batches = ((2048, 8192), (1, 8)) if quick else ((2048, 8192, 32768), (1, 8, 32))
    every = [[c, b] for c in contexts for b in batches]
    fits = [c * b * model.token_bytes(head_dim) < POOL_GIB * 2**30 * 0.95 for c, b in every]
    return [x for x, ok in zip(every, fits, strict=True) if ok], [
        x for x, ok in zip(every, fits, strict=True) if not ok
    ]


def decode(folder: Path, head_dim: int, quick: bool, bar: tqdm) -> list[dict[str, Any]]:
    path = model.make(folder, head_dim)
    wanted, skipped = cells(head_dim, quick)
    cycle = layout(BUDGET, head_dim).schedule.retire_tokens
    evicting = {"steps": CYCLES * cycle, "cycle": cycle}
    kinds = {
        "stock": (None, {"steps": STEPS}), "momentkv": (EVICTION, evicting),
        "16 bit": (EVICTION | {"store_dtype": "model"}, evicting),
    }  # fmt: skip
    seconds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for _ in range(1 if quick else 2):
        for name, (eviction, steps) in kinds.items():
            seconds[name].append([r["seconds"] for r in measure(path, eviction, "decode", cells=wanted, **steps)])
            bar.update()
    rows = []
    for i, (context, batch) in enumerate(wanted):
        stock, ours, exact = (statistics.median(run[i] for run in seconds[name]) for name in kinds)
        bound = bytes_bound(head_dim, context, batch)
        rows.append(
            {
                "head_dim": head_dim, "context": context, "batch": batch,
                "stock_tokens_per_second": batch / stock, "tokens_per_second": batch / ours,
                "speedup": stock / ours, "bytes_bound": bound, "of_bound": stock / ours / bound,
                "kv_bytes_to_stock": min(1.0, BUDGET / context), "to_16_bit_store": exact / ours,
            }
        )  # fmt: skip
    return rows + [
        {"head_dim": head_dim, "context": c, "batch": b, "skipped": "stock's KV exceeds the pool"} for c, b in skipped
    ]


def overhead(folder: Path, quick: bool, bar: tqdm) -> dict[str, float]:
    """Decode speed relative to vLLM without this package: eviction off, and contexts below the budget."""
    path, cell = model.make(folder, 128), [[1024, 8]]
    kinds = {"none": (None, ""), "off": (None, None), "under": (UNDER_BUDGET, None)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(2 if quick else 4):
        for name, (eviction, plugins) in kinds.items():
            runs = measure(path, eviction, "decode", plugins, gib=1, cells=cell, steps=LONG_STEPS)
            seconds[name].append(sum(r["seconds"] for r in runs))
            bar.update()
    base = seconds["none"]
    ratios = {n: statistics.median(b / s for b, s in zip(base, seconds[n], strict=True)) for n in ("off", "under")}
    spread = (max(base) - min(base)) / statistics.median(base)
    return {"off_to_stock": ratios["off"], "under_budget_to_stock": ratios["under"], "spread_of_stock": spread}


def pool(folder: Path, bar: tqdm) -> dict[str, Any]:
    """Sequences that run at a time in a fixed pool, against what the page arithmetic gives."""
    path = model.make(folder, 64)
    stock = measure(path, None, "pool", page_size=STOCK_PAGE)[0]
    bar.update()
    eviction = {"policy": "momentkv", "budget_tokens": POOL_BUDGET}
    ours = measure(path, eviction, "pool", page_size=OUR_PAGE)[0]
    bar.update()
    # A stock sequence grows from its prompt to its end: while others wait it holds the mean of both.
    stock_tokens = POOL_PROMPT + POOL_NEW / 2 + STOCK_PAGE / 2
    plan = layout(POOL_BUDGET, 64).schedule
    our_tokens = POOL_BUDGET - plan.retire_tokens / 2 + OUR_PAGE / 2
    arithmetic = stock_tokens / our_tokens
    ratio = ours["running"] / stock["running"]
    return {
        "pool_tokens": POOL_TOKENS, "stock": stock, "momentkv": ours,
        "ratio": ratio, "arithmetic": arithmetic, "of_arithmetic": ratio / arithmetic,
    }  # fmt: skip


def draw(results: dict[str, Any], axes: Any) -> None:
    rows = [r for r in results["decode"] if "speedup" in r]
    for axis, head_dim in zip(axes, (64, 128), strict=True):
        for batch in sorted({r["batch"] for r in rows}):
            part = [r for r in rows if (r["batch"], r["head_dim"]) == (batch, head_dim)]
            line = axis.plot([r["context"] for r in part], [r["speedup"] for r in part], "o-", label=f"batch {batch}")
            color = line[0].get_color()
            axis.plot([r["context"] for r in part], [r["bytes_bound"] for r in part], "--", color=color)
        axis.set(xscale="log", yscale="log", xlabel="context", title=f"head_dim {head_dim}, budget {BUDGET}")
        axis.set_xticks([2048, 8192, 32768], ["2K", "8K", "32K"])
        axis.legend(fontsize=8)
    axes[1].sharey(axes[0])
    axes[0].set_ylabel("decode tokens/s over stock (dashed: bytes bound)")


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows, overheads, pools = (results[section] for section in ("decode", "overhead", "pool"))
    found = []
    for context in (8192, 32768):
        shares = [r["of_bound"] for r in rows if r["context"] == context and "of_bound" in r]
        if shares:
            found.append(report.target(f"worst decode speed-up / bytes bound at {context // 1024}K", min(shares), 0.9))
    return [
        *found,
        report.target("eviction off / stock", overheads["off_to_stock"], 0.99),
        report.target("context under the budget / stock", overheads["under_budget_to_stock"], 0.99),
        report.target("concurrency / page arithmetic", pools["of_arithmetic"], 0.95),
    ]


def bare_step(folder: Path, bar: tqdm) -> list[dict[str, Any]]:
    """A stock decode step with next to no context, relative to that of batch 1, which reads the same weights.

    Where it is longer, matrix products are arithmetic, not bytes, and no KV cache can reach the bytes bound.
    """
    rows = []
    for head_dim in (64, 128):
        cell = [[64, batch] for batch in (1, 8, 32)]
        steps = measure(model.make(folder, head_dim), None, "decode", gib=1, cells=cell, steps=100)
        rows += [
            {"head_dim": head_dim, "batch": r["batch"], "to_batch_1": r["seconds"] / steps[0]["seconds"]} for r in steps
        ]
        bar.update()
    return rows


SECTIONS = {
    "decode": lambda folder, quick, bar: [r for d in (64, 128) for r in decode(folder, d, quick, bar)],
    "bare_step": lambda folder, quick, bar: bare_step(folder, bar),
    "overhead": overhead,
    "pool": lambda folder, quick, bar: pool(folder, bar),
}


def options(parser) -> None:
    parser.add_argument("--only", choices=SECTIONS, help="measure one section again, keep the others")


def measure_sections(args: Namespace) -> dict[str, Any]:
    results = BENCHMARK.known(args.quick) if args.only else {}
    with tempfile.TemporaryDirectory() as folder, tqdm(desc="engines") as bar:
        for section in [args.only] if args.only else SECTIONS:
            bar.set_postfix_str(section)
            results[section] = SECTIONS[section](Path(folder), args.quick, bar)
    return results


def tables(results: dict[str, Any]) -> list[list[list]]:
    columns = ("head_dim", "context", "batch", "speedup", "bytes_bound", "of_bound", "to_16_bit_store")
    done, pools = [r for r in results["decode"] if "speedup" in r], results["pool"]
    heading = ["sequences in a fixed pool, ratio", "by pages", "share", "preemptions stock", "momentkv"]
    figures = [*(pools[k] for k in ("ratio", "arithmetic", "of_arithmetic"))]
    return [
        report.rows_of(done, *(c for c in columns if c in done[0])),
        report.rows_of(results["bare_step"]),
        [heading, [*figures, *(pools[name]["preemptions"] for name in ("stock", "momentkv"))]],
    ]


BENCHMARK = Benchmark("serving", measure_sections, tables, targets, draw, panels=2, quick=True, options=options)

if __name__ == "__main__":
    BENCHMARK.run()
