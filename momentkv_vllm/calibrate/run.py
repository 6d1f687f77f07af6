"""`momentkv calibrate`: a real engine per budget on the user's texts, and the curve of what eviction costs there.

Nothing is changed but the files that --json and --plot name. Heavy modules are imported late: `momentkv --help` is fast.
"""

import argparse
import json
import os
import pickle
import random
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from momentkv_vllm.calibrate import curve, texts
from momentkv_vllm.refuse import refuse

SHARES = (8, 4, 2)
"""Budgets where none are named: the context over these, in whole pages of GRAIN tokens, at least LEAST_BUDGET."""
GRAIN, LEAST_BUDGET = 32, 128
JUDGED = 4
"""The last 1/4 of a stretch is judged."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="as `vllm serve` takes it")
    add(
        "--texts", type=Path, required=True, help=f".txt, folder of .txt, or .jsonl with one of {', '.join(texts.KEYS)}"
    )
    add("--budgets", type=int, nargs="+", metavar="TOKENS", help="default: 1/8, 1/4 and 1/2 of the context")
    add(
        "--context", type=int, metavar="TOKENS", help="length of a stretch of text; default: 2048, or the texts' length"
    )
    add("--items", type=int, default=8, help="how many stretches, and how many hidden codes (default: %(default)s)")
    add("--tolerance", type=float, default=0.05, help="KL to the full cache, nats per token (default: %(default)s)")
    add("--pool-gib", type=float, help="KV pool to count sequences in; default: the engine's own")
    add("--json", type=Path, metavar="FILE", help="write settings, curve and answer there")
    add("--plot", type=Path, metavar="FILE", help="write the curve as .png or .svg there (needs matplotlib)")


@dataclass(frozen=True)
class Job:
    """What every engine is asked: stretches of text, then hidden codes."""

    model: str
    flags: tuple[str, ...]
    context: int
    items: tuple[Any, ...]
    texts: int


def measure(job: Job, budget: int, reference: bytes | None) -> tuple[list[dict], dict[str, float], bytes]:
    """Results by item, the engine's room, and (of budget 0, which needs none) the reference for the others, pickled: a tensor in
    a process's result would be shared memory of a process that ends. Raises ValueError if the engine does not start."""
    from momentkv_vllm.calibrate.engine import arguments, start
    from momentkv_vllm.calibrate.verdict import Judge

    judge = Judge(job.items, pickle.loads(reference) if reference else None)
    try:
        engine = start(arguments(job.model, job.flags, job.context, budget))
    except Exception as error:
        raise ValueError(f"--model {job.model} does not load here: {error}; try it with `vllm serve` first") from error
    engine.ask(job.items, judge)
    room = engine.room(job.context)
    engine.close()
    return judge.results(), room, b"" if reference else pickle.dumps(judge.full_cache())


def measure_all(job: Job, budgets: Sequence[int], pool_gib: float | None) -> tuple[list[curve.Point], float]:
    """The curve from the largest budget to the smallest, the full cache first, and the pool's GiB. An engine has a process of its
    own: memory is free for certain when it has ended."""
    import concurrent.futures
    import multiprocessing

    from tqdm import tqdm

    points, reference, full = [], None, None
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for budget in tqdm([0, *sorted(budgets, reverse=True)], desc="full cache and budgets"):
            results, room, saved = pool.submit(measure, job, budget, reference).result()
            reference = reference or saved
            both = results[: job.texts], results[job.texts :]
            full, pool_gib = full or both, pool_gib or room["pool_bytes"] / 2**30
            room["sequences"] *= pool_gib * 2**30 / room["pool_bytes"]
            points.append(curve.Point.of(budget, both, full, room))
    return points, pool_gib


def refuse_options(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Raises ValueError."""
    for key, value in (("items", args.items), ("tolerance", args.tolerance), ("pool-gib", args.pool_gib)):
        if value is not None and not value > 0:
            refuse(f"--{key} {value}: legal is above 0", "leave it out")
    for key, path in (("json", args.json), ("plot", args.plot)):
        if path and not path.absolute().parent.is_dir():
            refuse(f"--{key} {path}: there is no such folder", "make it")
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        refuse(f"--plot {args.plot}: legal endings are .png and .svg", "leave it out")
    if any(flag.split("=")[0] == "--kv-budget" for flag in flags):
        refuse("--kv-budget is what calibrate looks for", "name those to try with --budgets")


def plan(args: argparse.Namespace, flags: Sequence[str]) -> tuple[Job, list[int]]:
    """Everything that can be refused is, before any engine starts. Raises ValueError."""
    refuse_options(args, flags)
    found = texts.read(args.texts)
    from momentkv_vllm.calibrate.engine import arguments
    from momentkv_vllm.calibrate.items import Reader, hidden_code, text_item

    reader = Reader(_tokenizer(arguments(args.model, flags, args.context or texts.MOST_CONTEXT, 0)))
    stretches = texts.stretches([reader.ids(t) for t in found], reader.begin(), args.context, args.items)
    context = len(stretches[0])
    budgets = args.budgets or [b for share in SHARES if (b := context // share // GRAIN * GRAIN) >= LEAST_BUDGET]
    for budget in budgets:
        if not 0 < budget < context:
            refuse(f"--budgets {budget}: legal is 1 to {context - 1}, below the context", "raise --context")
        _check(arguments(args.model, flags, context, budget))
    chance = random.Random(0)
    codes = [
        hidden_code(reader, chance, stretches[i % len(stretches)], (i + 0.5) / args.items) for i in range(args.items)
    ]
    items = [text_item(s, context // JUDGED) for s in stretches] + [c for c in codes if c.counted]
    return Job(args.model, tuple(flags), context, tuple(items), len(stretches)), sorted(set(budgets))


def _tokenizer(given: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            given.tokenizer or given.model,
            revision=given.tokenizer_revision or given.revision,
            trust_remote_code=given.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        refuse(
            f"--model {given.model} has no tokenizer that loads: {error}", "name a checkpoint that `vllm serve` loads"
        )


def _check(given: Any) -> None:
    """Raises ValueError on what eviction does not do, and on several devices."""
    try:
        devices = given.create_engine_config().parallel_config.world_size
    except OSError as error:
        refuse(f"--model {given.model} does not load: {error}", "name a checkpoint that `vllm serve` loads")
    if devices > 1:
        refuse(
            f"calibrate reads logits in one process: {devices} devices, legal is 1", "calibrate a model that fits one"
        )


def calibrate(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """The whole command: `flags` are those of `vllm serve`. Raises ValueError on what cannot be measured."""
    job, budgets = plan(args, flags)
    codes = len(job.items) - job.texts
    print(f"{job.texts} texts of {job.context} tokens and {codes} codes, budgets {budgets}", flush=True)
    points, pool_gib = measure_all(job, budgets, args.pool_gib)
    best = curve.smallest(points, args.tolerance)
    command = best and shlex.join(
        ["vllm", "serve", args.model, *_serving(flags), "--kv-budget", str(best.budget_tokens)]
    )
    print(curve.table(points, pool_gib))
    if not args.plot or not _plotted(points, args):
        print(f"\nKL by budget, | is the tolerance {args.tolerance:g}:\n{curve.bars(points, args.tolerance)}")
    if best:
        print(f"\nThe smallest budget within {args.tolerance:g} nats per token:\n  {command}")
    else:
        print(f"\nNo budget is within {args.tolerance:g} nats per token: try larger --budgets, or a larger --tolerance")
    if args.json:
        kept = {"model": os.path.basename(args.model.rstrip("/")), "flags": job.flags, "context": job.context}
        kept |= {"texts": job.texts, "codes": codes, "tolerance": args.tolerance, "pool_gib": pool_gib}
        answer = {
            "points": [asdict(p) for p in points],
            "budget_tokens": best and best.budget_tokens,
            "command": command,
        }
        args.json.write_text(json.dumps({**kept, **answer}, indent=1) + "\n")


def _serving(flags: Sequence[str]) -> list[str]:
    named = any(flag.split("=")[0] == "--kv-eviction" for flag in flags)
    return [*flags] if named else [*flags, "--kv-eviction", "momentkv"]


def _plotted(points: Sequence[curve.Point], args: argparse.Namespace) -> bool:
    try:
        curve.plot(points, args.tolerance, args.plot)
    except ImportError:
        print(f"--plot {args.plot} is not written: matplotlib is not installed (pip install matplotlib)")
        return False
    return True
