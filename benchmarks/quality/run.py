"""Answers under eviction against those of the full cache: RULER, LongBench, KL and perplexity; at equal bytes and equal tokens.

    make bench-quality                                      # test model, in process, about half an hour
    python -m quality.run --model meta-llama/Llama-3.1-8B-Instruct --wording english --chat --context 16384 \\
        --budgets 1024 2048 4096 --tasks ruler text --text-file book.txt --samples 100 --out llama   # on a GPU
    python -m quality.run --model M --url full=http://127.0.0.1:8000 --url momentkv=http://127.0.0.1:8001 ...

Equal bytes: every method has `budget` tokens, the moments included. Equal tokens: a method with moments gets their pages on top,
so that it retains as many tokens as a method without. Cells that are in the output file already are not run again.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
from divergence import mean_kl
from quality import longbench, ruler
from quality.models import Endpoint, InProcess
from quality.wording import Compact, English
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from momentkv_vllm.block_manager.spec import record_layout
from momentkv_vllm.config import EvictionConfig

HERE = Path(__file__).resolve().parent
TEST_MODEL = HERE.parent / "test_model/checkpoint"
PAGE = 16
FORCED = 64
FULL = "full cache"

METHODS: dict[str, dict[str, Any]] = {
    "momentkv": {"policy": "momentkv"},
    "momentkv, zeroth": {"policy": "momentkv", "correction": "zeroth"},
    "momentkv, off": {"policy": "momentkv", "correction": "off"},
    "paper": {"policy": "paper"},
    **{
        name: {"policy": name}
        for name in ("streamingllm", "random", "knorm", "keydiff", "h2o", "tova", "snapkv", "expected_attention")
    },
}


@dataclass(frozen=True)
class Cell:
    """One configuration; `pages`: KV pages of a sequence, everything included."""

    method: str
    prefill: str = ""
    budget: int = 0
    column: str = "bytes"
    extra_tokens: int = 0

    @property
    def name(self) -> str:
        return f"{self.method} / {self.prefill} / {self.budget} / {self.column}" if self.budget else self.method

    @property
    def eviction(self) -> dict[str, Any]:
        return {**METHODS[self.method], "prefill": self.prefill, "budget_tokens": self.budget + self.extra_tokens}


@dataclass(frozen=True)
class Work:
    """Everything that every cell answers."""

    questions: list[ruler.Sample | longbench.Example]
    texts: list[str]


def cells(methods: Sequence[str], budgets: Sequence[int], prefills: Sequence[str], head_dim: int) -> Iterator[Cell]:
    """The full cache first; then every method at equal bytes, and those with moments at equal tokens too."""
    yield Cell(FULL)
    for budget in budgets:
        for prefill in prefills:
            for method in methods:
                yield Cell(method, prefill, budget)
                config = EvictionConfig.from_dict(METHODS[method])
                state = record_layout(config, head_dim).pages(PAGE, 2) * PAGE
                if state:
                    yield Cell(method, prefill, budget, "tokens", state)


def run_cell(model: str, cell: Cell, work: Work, context: int, threads_bind: str | None) -> dict[str, Any]:
    """Scores per task, distributions over the texts. Runs in a worker process."""
    if threads_bind is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads_bind
    options: dict[str, Any] = {"block_size": PAGE, "max_num_batched_tokens": 512, "max_num_seqs": 16, "enforce_eager": True}
    options |= {"max_model_len": context + 256, "enable_prefix_caching": False}
    if cell.budget:
        options["additional_config"] = {"kv_eviction": cell.eviction}
    return judge(InProcess(model, **options), work)


def judge(who: InProcess | Endpoint, work: Work) -> dict[str, Any]:
    """Let `who` answer everything and close it."""
    said = who.answers([q.prompt for q in work.questions], [q.answer_tokens for q in work.questions])
    scores: dict[str, list[float]] = {}
    for question, text in zip(work.questions, said, strict=True):
        if isinstance(question, ruler.Sample):
            value = ruler.score(question.task, text, question.references)
        else:
            value = longbench.score(question.task, text, question.answers, question.classes)
        scores.setdefault(question.task, []).append(value)
    result: dict[str, Any] = {"scores": scores}
    if work.texts:
        result["known"], result["loss"] = who.continuations(work.texts, FORCED)
    who.close()
    return result


def summary(result: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Means and standard errors; `vs_full`: the paired difference to the full cache, whose noise is smaller."""
    tasks = {t: statistics.fmean(s) for t, s in result["scores"].items()}
    pairs = [a - b for t, s in result["scores"].items() for a, b in zip(s, full["scores"][t], strict=True)]
    out: dict[str, Any] = {"tasks": tasks}
    if pairs:
        out["mean"] = statistics.fmean(tasks.values())
        out["vs_full"] = statistics.fmean(pairs)
        out["vs_full_error"] = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
    if "known" in result:
        out["kl"] = mean_kl(full["known"], result["known"])
        out["perplexity"] = math.exp(result["loss"])
    return out


def make_work(args: argparse.Namespace, tokenizer: Any) -> Work:
    """Samples of every task and seed, and the texts."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    book = Path(args.text_file).read_text() if args.text_file else ""
    wording = Compact() if args.wording == "compact" else English(book)
    questions: list[Any] = []
    for task in args.tasks:
        for seed in args.seeds:
            rng = random.Random(f"{task} {seed}")
            if task in ruler.TASKS:
                length = args.context - 2 - (0 if args.wording == "compact" else 64)
                made = [ruler.sample(task, rng, wording, length, count_tokens) for _ in range(args.samples)]
                slack = 0 if args.wording == "compact" else 24
                questions += [ruler.Sample(**{**vars(s), "answer_tokens": s.answer_tokens + slack}) for s in made]
            elif task in longbench.METRICS:
                questions += longbench.load(args.longbench, task, tokenizer, args.context, args.samples, seed)
    rng = random.Random("texts")
    texts = []
    for _ in range(args.texts if "text" in args.tasks else 0):
        words = " ".join(wording.text(rng, args.context))
        ids = tokenizer(words, add_special_tokens=False).input_ids[: args.context - 2]
        texts.append(tokenizer.decode(ids))
    return Work(questions, texts)


def evaluate(todo: list[Cell], args: argparse.Namespace, work: Work) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Results as they come; the full cache alone first."""
    cores = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=8) as pool:
        binds = [str(i % cores) if args.jobs > 1 else None for i in range(len(todo))]
        running = {
            pool.submit(run_cell, str(args.model), cell, work, args.context, "nobind" if bind else None): cell
            for cell, bind in zip(todo, binds, strict=True)
        }
        for done in tqdm(concurrent.futures.as_completed(running), total=len(running), desc="cells"):
            yield running[done], done.result()


def expand(names: Sequence[str]) -> list[str]:
    """`ruler` and `longbench` stand for all their tasks."""
    groups = {"ruler": list(ruler.TASKS), "longbench": list(longbench.METRICS)}
    out = [task for name in names for task in groups.get(name, [name])]
    for task in out:
        if task not in ruler.TASKS and task not in longbench.METRICS and task != "text":
            raise SystemExit(f"--tasks {task}: not one of ruler, longbench, text, {', '.join([*ruler.TASKS, *longbench.METRICS])}")
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(TEST_MODEL), help="checkpoint (its tokenizer counts tokens for endpoints too)")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="endpoints to compare; the first is the full cache")
    parser.add_argument("--chat", action="store_true", help="endpoints: ask as chat messages")
    parser.add_argument("--tasks", nargs="+", default=["ruler", "text"])
    parser.add_argument("--wording", choices=("compact", "english"), default="compact", help="compact: the test model's vocabulary")
    parser.add_argument("--text-file", help="running text for haystacks and KL")
    parser.add_argument("--longbench", type=Path, help="local checkout of LongBench")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 256, 128, 64])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--prefill", nargs="+", choices=("chunked", "full"), default=["chunked", "full"])
    parser.add_argument("--samples", type=int, default=16, help="prompts per task and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time, one process each")
    parser.add_argument("--out", default="quality", help="results/NAME.json and .png")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.tasks = expand(args.tasks)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    work = make_work(args, tokenizer)
    path = report.RESULTS / f"{args.out}.raw.json"
    raw: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if args.url:
        for name, url in (pair.split("=", 1) for pair in args.url):
            raw[name] = judge(Endpoint(url, tokenizer, chat=args.chat), work)
        plan = [Cell(name) for name in raw]
    else:
        config = AutoConfig.from_pretrained(args.model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plan = list(cells(args.methods, args.budgets, args.prefill, head_dim))
        for cell, result in evaluate([c for c in plan if c.name not in raw], args, work):
            raw[cell.name] = result
            path.write_text(json.dumps(raw))
    full = raw[next(iter(c.name for c in plan))]
    results = {c.name: {**asdict(c), **summary(raw[c.name], full)} for c in plan}
    from quality import show

    print(show.tables(results))
    settings = {"context": args.context, "samples": args.samples * len(args.seeds), "model": Path(args.model).name}
    report.write(args.out, {**settings, "cells": results}, show.targets(results))
    if not args.url:
        show.plot(results, report.RESULTS / f"{args.out}.png")


if __name__ == "__main__":
    main()
