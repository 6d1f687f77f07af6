"""`make bench-gpu RUN=D`: stock vLLM against momentkv in the engine, CUDA graphs on. Needs vllm==0.32.0 and a GPU.

Each engine in a process of its own, in turn. First that CUDA graphs give the tokens of the eager engine, then time to first
token, decode tokens/s (mean over a cycle of evictions, prompts really read), and how many tokens' KV the pool has. Both engines
replay decode steps from FULL CUDA graphs; nothing is compiled, which takes longer than a run may, and wants vLLM's own torch.
Writes gpu_engine_BATCHES.json to $OUT or benchmarks/results. On a CPU, `--eager` with small cells runs the same code: figures
of the script, not of a GPU.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import report
from serving import model
from serving.run import layout, measure
from tqdm import tqdm

HEAD_DIM = 128
CONTEXTS, BATCHES = [2048, 8192, 32768], [1, 8, 32]
REPEATS, CYCLES = 2, 3
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint instead of the random-weight Llama (8 layers, d=128)")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, and no check of them")
    return parser.parse_args()


def same_tokens(path: Path, eviction: dict[str, Any], context: int) -> bool:
    """Whether captured steps, those that retire pages among them, give the tokens of the eager engine."""
    runs = [
        measure(path, eviction, "tokens", cells=[[context, 4]], compilation=graphs)[0]["tokens"]
        for graphs in (None, GRAPHS)
    ]
    return runs[0] == runs[1]


def engines(
    path: Path, eviction: dict[str, Any], cells: list[list[int]], graphs: dict | None, repeats: int
) -> dict[str, dict[str, list]]:
    """{"decode", "ttft"}: {"stock", "momentkv"}: the results of each repeat."""
    cycle = layout(eviction["budget_tokens"], HEAD_DIM).schedule.retire_tokens
    steps = {"steps": CYCLES * cycle, "cycle": cycle, "cells": cells}
    tasks = {"decode": steps, "ttft": {"cells": [[c, 1] for c in sorted({c for c, _ in cells})]}}
    found: dict[str, dict[str, list]] = {kind: {"stock": [], "momentkv": []} for kind in tasks}
    with tqdm(total=2 * repeats * len(tasks), desc="engines") as bar:
        for _ in range(repeats):
            for name, settings in (("stock", None), ("momentkv", eviction)):
                for kind, task in tasks.items():
                    made = measure(path, settings, kind, compilation=graphs, fake_prefill=False, **task)
                    found[kind][name].append(made)
                    bar.update()
    return found


def ratios(found: dict[str, list]) -> list[dict[str, Any]]:
    """momentkv's speed over stock's for each cell, and both pools."""
    rows = []
    for i, cell in enumerate(found["stock"][0]):
        stock, ours = (statistics.median(run[i]["seconds"] for run in found[name]) for name in ("stock", "momentkv"))
        pools = {f"{name}_pool_tokens": found[name][0][i]["pool_tokens"] for name in found}
        rows.append(
            {
                "context": cell["context"],
                "batch": cell["batch"],
                "seconds_stock": stock,
                "speedup": stock / ours,
                **pools,
            }
        )
    return rows


def main() -> None:
    args = arguments()
    os.environ.setdefault("MOMENTKV_ALLOW_UNTESTED_GPU", "1")
    eviction = {"policy": "momentkv", "budget_tokens": args.budget}
    cells = [[context, batch] for context in args.contexts for batch in args.batches]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.model) if args.model else model.make(Path(folder), HEAD_DIM)
        same = None if args.eager else same_tokens(path, eviction, 2 * args.budget)
        if same is False:
            raise SystemExit("CUDA graphs give other tokens than the eager engine: nothing is timed")
        found = engines(path, eviction, cells, None if args.eager else GRAPHS, args.repeats)
    results = {kind: ratios(runs) for kind, runs in found.items()}
    for kind, rows in results.items():
        print(kind, report.table([list(rows[0]), *(list(r.values()) for r in rows)]), sep="\n", end="\n\n")
    if os.environ.get("OUT"):
        report.RESULTS = Path(os.environ["OUT"])
    batches = "_".join(map(str, args.batches))
    report.write(
        f"gpu_engine_{batches}", {"device": device(), "eager": args.eager, "graphs_equal_eager": same, **results}
    )


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
