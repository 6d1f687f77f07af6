"""`momentkv calibrate`: a real engine per budget on the user's texts, and the curve of what eviction costs there.

Nothing is changed but the files that --json and --plot name. Heavy modules are imported late: `momentkv --help` is fast.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shlex
from collections.abc import Iterator, Sequence
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

Arrays = list[list[Any]]
"""A `Reference` as numpy arrays."""


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


def measure(job: Job, budget: int, reference: Arrays | None) -> tuple[list[dict], dict[str, float], Arrays | None]:
    """Results by item, the engine's room, and (of budget 0, which needs none) the reference for the others, as arrays: a tensor
    in a process's result would be shared memory of a process that ends. Raises ValueError if the engine does not start."""
    from momentkv_vllm.calibrate.engine import arguments, start
    from momentkv_vllm.calibrate.verdict import Judge, Reference

    judge = Judge(job.items, Reference.from_arrays(reference) if reference else None)
    with _loading(job.model, Exception):
        engine = start(arguments(job.model, job.flags, job.context, budget))
    engine.ask(job.items, judge)
    room = engine.room(job.context)
    engine.close()
    return judge.results(), room, None if reference else judge.full_cache().to_arrays()


def measure_all(job: Job, budgets: Sequence[int], pool_gib: float | None) -> tuple[list[curve.Point], float]:
    """The curve from the largest budget to the smallest, the full cache first, and the pool's GiB. An engine has a process of its
    own: memory is free for certain when it has ended. Raises ValueError if one does not start or is ended."""
    import concurrent.futures
    import multiprocessing

    from tqdm import tqdm

    points, reference, full = [], None, None
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for budget in tqdm([0, *sorted(budgets, reverse=True)], desc="full cache and budgets"):
            try:
                results, room, saved = pool.submit(measure, job, budget, reference).result()
            except concurrent.futures.BrokenExecutor:
                memory = "lower --kv-cache-memory-bytes or VLLM_CPU_KVCACHE_SPACE"
                refuse("an engine's process was ended, for want of memory most likely", memory, "lower --context")
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
    if "--kv-budget" in _names(flags):
        refuse("--kv-budget is what calibrate looks for", "name those to try with --budgets")


def _names(flags: Sequence[str]) -> set[str]:
    return {flag.split("=")[0].replace("_", "-") for flag in flags}


def plan(args: argparse.Namespace, flags: Sequence[str]) -> tuple[Job, list[int]]:
    """Everything that can be refused is, before any engine starts. Raises ValueError."""
    refuse_options(args, flags)
    found = texts.read(args.texts)
    from momentkv_vllm.calibrate.engine import arguments
    from momentkv_vllm.calibrate.items import Reader, hidden_code, text_item

    reader = Reader(_tokenizer(args.model, flags))
    begin = reader.begin()
    stretches = texts.stretches([reader.ids(t) for t in found], args.context, args.items, len(begin))
    context = len(begin + stretches[0])
    budgets = args.budgets or [b for share in SHARES if (b := context // share // GRAIN * GRAIN) >= LEAST_BUDGET]
    for budget in budgets:
        if not 0 < budget < context:
            refuse(f"--budgets {budget}: legal is 1 to {context - 1}, below the context", "raise --context")
        _check(arguments(args.model, flags, context, budget))
    chance = random.Random(0)
    codes = [
        hidden_code(reader, chance, stretches[i % len(stretches)], (i + 0.5) / args.items) for i in range(args.items)
    ]
    items = [text_item(begin + s, context // JUDGED) for s in stretches] + [c for c in codes if c.counted]
    return Job(args.model, tuple(flags), context, tuple(items), len(stretches)), sorted(set(budgets))


def _tokenizer(model: str, flags: Sequence[str]) -> Any:
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoTokenizer

    from momentkv_vllm.calibrate.engine import arguments

    with _loading(model, HFValidationError):
        given = arguments(model, flags, texts.MOST_CONTEXT, 0)
    with _loading(model, OSError, ValueError, KeyError):
        return AutoTokenizer.from_pretrained(
            given.tokenizer or given.model,
            revision=given.tokenizer_revision or given.revision,
            trust_remote_code=given.trust_remote_code,
            # Texts are cut afterwards; a warning that they are too long for the model would mislead.
            model_max_length=2**31,
        )


@contextlib.contextmanager
def _loading(model: str, *errors: type[Exception]) -> Iterator[None]:
    """Raises ValueError instead of `errors`."""
    try:
        yield
    except errors as error:
        refuse(f"--model {model} does not load here: {error}", "name a checkpoint that `vllm serve` loads")


def _check(given: Any) -> None:
    """Raises ValueError on what eviction does not do, and on several devices."""
    from momentkv_vllm.config import EvictionConfig

    with _loading(given.model, OSError):
        found = given.create_engine_config()
    if not EvictionConfig.from_vllm(found).active:
        refuse("--kv-eviction off evicts nothing", "name a policy")
    devices = found.parallel_config.world_size
    if devices > 1:
        refuse(
            f"calibrate reads logits in one process: {devices} devices, legal is 1", "calibrate a model that fits one"
        )


def calibrate(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """The whole command: `flags` are those of `vllm serve`. Raises ValueError on what cannot be measured."""
    if "--kv-eviction" not in _names(flags):
        flags = ["--kv-eviction", "momentkv", *flags]
    job, budgets = plan(args, flags)
    codes = len(job.items) - job.texts
    print(f"{job.texts} texts of {job.context} tokens and {codes} codes, budgets {budgets}", flush=True)
    points, pool_gib = measure_all(job, budgets, args.pool_gib)
    best = curve.smallest(points, args.tolerance)
    command = best and shlex.join(["vllm", "serve", args.model, *flags, "--kv-budget", str(best.budget_tokens)])
    print(curve.table(points, pool_gib))
    if args.plot and importlib.util.find_spec("matplotlib"):
        curve.plot(points, args.tolerance, args.plot)
    else:
        missing = f" ({args.plot} is not written: matplotlib is not installed)" if args.plot else ""
        print(f"\nKL by budget, | is the tolerance{missing}:\n{curve.bars(points, args.tolerance)}")
    if best:
        print(f"\nThe smallest budget within {args.tolerance:g} nats per token:\n  {command}")
        if best.found < best.findable:
            lost = f"{best.findable - best.found} of {best.findable} codes that the full cache finds"
            print(f"It loses {lost}: for single facts out of long texts take a larger one, or another policy.")
    else:
        print(f"\nNo budget is within {args.tolerance:g} nats per token: try larger --budgets, or a larger --tolerance")
    if args.json:
        kept = {"model": os.path.basename(args.model.rstrip("/")), "flags": flags, "context": job.context}
        kept |= {"texts": job.texts, "codes": codes, "tolerance": args.tolerance, "pool_gib": round(pool_gib, 3)}
        answer = {
            "points": [asdict(p) for p in points],
            "budget_tokens": best and best.budget_tokens,
            "command": command,
        }
        args.json.write_text(json.dumps({**kept, **answer}, indent=1) + "\n")
