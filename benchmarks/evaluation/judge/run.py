"""The quality of eviction on a real pretrained model: KL and perplexity of text, needles, reference answers, a long chat.

    make real-model
    PYTHONPATH=benchmarks python -P -m evaluation.judge.run --documents LEVAL --backend simulator         # minutes
    PYTHONPATH=benchmarks python -P -m evaluation.judge.run --documents LEVAL --half report --kinds all   # the engine

Settings are chosen on one half of the documents (`--half choose`) and reported on the other. All methods hold the same bytes.
Finished cells are in build/judge and not run again, unless the code that evicts has changed since.
"""

import argparse
import concurrent.futures
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from evaluation.judge import documents, show
from evaluation.judge.material import KINDS, SMALL, Material
from evaluation.judge.shelf import Shelf
from evaluation.quality.cells import FP8, FULL, KNOWN, METHODS, Cell, cells
from real_model import folder
from research.simulate import Eviction, Rounded
from research.states import ROUNDED
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from momentkv_vllm.calibrate.items import Item
from momentkv_vllm.calibrate.verdict import Judge
from momentkv_vllm.config import PREFILL_MODES, EvictionConfig
from momentkv_vllm.kv_spec import StateLayout

BACKENDS = ("engine", "simulator")
Shelves = dict[str, tuple[Shelf, list[Item]]]
"""By kind: where its results are kept, and its items."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the cell."""

    model: str
    documents: Path
    half: str
    kinds: tuple[str, ...]
    backend: str
    dtype: str
    any_code: bool
    items: int

    def shelves(self) -> Shelves:
        material = Material(
            AutoTokenizer.from_pretrained(self.model), documents.load(self.documents, self.half), self.half
        )
        found = {kind: material.items(kind, self.items) for kind in self.kinds}
        shelf = {
            kind: Shelf(self.model, f"{kind}_{self.half}", items, self.backend, self.dtype, self.any_code)
            for kind, items in found.items()
        }
        return {kind: (shelf[kind], items) for kind, items in found.items()}


def simulated(cell: Cell, dtype: str, head_dim: int, prompt: int) -> Eviction | Rounded | None:
    """`cell` as the simulator takes it; bytes are those of a cache of `dtype`, arithmetic is float32."""
    if cell.method in ROUNDED:
        return Rounded(*ROUNDED[cell.method])
    if not cell.prefill:
        return None
    config = EvictionConfig.from_dict(cell.eviction)
    layout = StateLayout.of(config, cell.page_size, head_dim, getattr(torch, dtype))
    return Eviction.of(config, layout.schedule, prompt, layout.packed)


def play(cell: Cell, job: Job, shelves: Shelves, simulator: Any = None) -> None:
    """Run the unfinished kinds of one cell; the full cache's reference must be there for any other cell."""
    shelves = {k: (s, items) for k, (s, items) in shelves.items() if s.results(cell) is None}
    engine = None
    for shelf, items in shelves.values():
        judge, began = (
            Judge(items, None if cell.method == FULL else shelf.reference()),
            (time.monotonic(), time.process_time()),
        )
        if job.backend == "simulator":
            simulator.ask(items, judge, lambda prompt: simulated(cell, job.dtype, simulator.head_dim, prompt))
        else:
            from momentkv_vllm.calibrate.engine import Engine

            longest = max(KINDS[kind].context for kind in shelves)
            options = {**cell.engine_options(longest), "dtype": job.dtype}
            engine = engine or Engine(job.model, **options)
            engine.ask(items, judge)
        if cell.method == FULL:
            shelf.save_reference(judge.full_cache())
        shelf.save(cell, judge.results(), time.monotonic() - began[0], time.process_time() - began[1])
    if engine:
        engine.close()


def play_all(plan: Sequence[Cell], job: Job, shelves: Shelves) -> None:
    """Every unfinished cell, in order. An engine has a process of its own: memory is free for certain when it has ended."""
    if job.backend == "simulator":
        from evaluation.judge.simulator import Simulator

        simulator = Simulator(job.model)
        for cell in tqdm(plan, desc="cells"):
            play(cell, job, shelves, simulator)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for cell in tqdm(plan, desc="cells"):
            pool.submit(play, cell, job, shelves).result()


def plan_of(args: argparse.Namespace, head_dim: int) -> Iterator[Cell]:
    """The full cache, those that keep all tokens in fewer bits, and the methods that evict."""
    yield Cell(FULL)
    keeping = ROUNDED if args.backend == "simulator" else (FP8,)
    yield from (Cell(name) for name in keeping if name in args.methods)
    evicting = [m for m in args.methods if m in KNOWN]
    found = cells(evicting, args.budgets, args.prefill, 0, head_dim)
    yield from (c for c in found if c.prefill and c.column in args.columns)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(folder.FOLDER), help="checkpoint folder")
    add("--documents", type=Path, required=True, help="folder of L-Eval's tasks or a checkout of LongBench")
    add("--half", choices=documents.HALVES, default="choose", help="of the documents")
    add("--backend", choices=BACKENDS, default="engine")
    add("--kinds", nargs="+", choices=[*KINDS, "all", "small"], default=["small"])
    add("--items", type=int, default=0, help="of each kind; 0: as many as it has")
    add("--methods", nargs="+", choices=[*KNOWN, *ROUNDED], default=[*METHODS, *ROUNDED])
    add("--budgets", type=int, nargs="+", default=[512, 256, 128], help="tokens")
    add("--prefill", nargs="+", choices=PREFILL_MODES, default=["chunked", "full"])
    add("--columns", nargs="+", choices=("bytes", "tokens"), default=["bytes"], help="what is equal")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the KV cache, and of the engine's model",
    )
    add("--any-code", action="store_true", help="take finished cells of older code as they are")
    add("--out", default="", help="results/NAME.json; judge_BACKEND_HALF if empty")
    args = parser.parse_args(argv)
    if args.model == str(folder.FOLDER) and folder.find() is None:
        parser.error(folder.WHY_NOT)
    named = {"all": tuple(KINDS), "small": SMALL}
    args.kinds = tuple(dict.fromkeys(k for name in args.kinds for k in named.get(name, (name,))))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    keys = ("model", "documents", "half", "kinds", "backend", "dtype", "any_code", "items")
    job = Job(**{key: getattr(args, key) for key in keys})
    config = AutoConfig.from_pretrained(args.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plan = list(plan_of(args, head_dim))
    shelved = job.shelves()
    shelves = {kind: shelf for kind, (shelf, _) in shelved.items()}
    play_all([c for c in plan if any(s.results(c) is None for s in shelves.values())], job, shelved)
    found = [{kind: shelf.results(cell) for kind, shelf in shelves.items()} for cell in plan]
    rows = [show.Row(cell, results, found[0]) for cell, results in zip(plan, found, strict=True)]
    seconds = {
        cell.name: [round(sum(x)) for x in zip(*(s.seconds(cell) for s in shelves.values()), strict=True)]
        for cell in plan
    }
    print(show.table(rows))
    settings = {"model": Path(args.model).name, **{k: getattr(args, k) for k in ("half", "backend", "dtype")}}
    measured = {"cells": [row.to_json() for row in rows], "wall_and_cpu_seconds": seconds}
    report.write(args.out or f"judge_{args.backend}_{args.half}", {**settings, **measured})


if __name__ == "__main__":
    main()
