"""Answers under eviction against those of the full cache: RULER, LongBench, KL and perplexity; at equal bytes and equal tokens.

    make bench NAME=quality-toy                                  # small: the test model, in process
    python -P -m evaluation.quality.run --model meta-llama/Llama-3.1-8B-Instruct --wording english --chat --context 16384 \\
        --budgets 8192 4096 2048 1024 --samples 100 --text-file book.txt --out llama        # on a GPU
    python -P -m evaluation.quality.run --model M --url full=http://127.0.0.1:8000 --url momentkv=http://127.0.0.1:8001

Equal bytes: every method has `budget` tokens, the moments included. Equal tokens: a method with moments gets their pages on top,
so that it retains as many tokens as a method without. Cells that are done are in build/quality and not run again.
"""

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from evaluation.quality import questions, show
from evaluation.quality.cells import DTYPE, FP8, KNOWN, METHODS, Cell, cells
from evaluation.quality.models import Endpoint, InProcess
from evaluation.quality.questions import Question
from evaluation.quality.results import judge
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

BENCHMARKS = Path(__file__).resolve().parents[2]
TEST_MODEL = BENCHMARKS / "test_model/checkpoint"
RAW = BENCHMARKS.parent / "build/quality"
CELLS_PER_PROCESS = 1 if torch.cuda.is_available() else 16
"""Device memory is free for certain when the process has ended; on a CPU the imports take longer than a small engine."""


def ask(who: InProcess | Endpoint, asked: Sequence[Question], texts: Sequence[str]) -> dict[str, Any]:
    """What `who` said to every question, and its distributions over the texts; closes it."""
    said = who.answers(asked)
    known, loss = who.continuations(texts) if texts else ([], None)
    who.close()
    return {"said": said, "known": known, "loss": loss}


def ask_engine(model: str, cell: Cell, asked: Sequence[Question], texts: Sequence[str], context: int) -> dict[str, Any]:
    """Runs in a worker process."""
    return ask(InProcess(model, **cell.engine_options(context)), asked, texts)


def raw_folder(model: str, context: int, asked: Sequence[Question], texts: Sequence[str]) -> Path:
    """Where finished cells of exactly this model and work are kept."""
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(model).glob("*.safetensors"))]
    prompts = [(q.prompt, q.answer_tokens, q.chat) for q in asked]
    work = json.dumps([model, weights, context, prompts, list(texts)])
    return RAW / hashlib.sha256(work.encode()).hexdigest()[:12]


def answers_of_engines(
    plan: Sequence[Cell], model: str, context: int, asked: Sequence[Question], texts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What every cell said, in order; one engine at a time."""
    folder = raw_folder(model, context, asked, texts)
    folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=CELLS_PER_PROCESS) as pool:
        for cell in tqdm(plan, desc="cells"):
            path = folder / f"{cell.name.replace(' / ', '_').replace(' ', '-')}.json"
            if not path.exists():
                said = pool.submit(ask_engine, model, cell, asked, texts, context).result()
                path.write_text(json.dumps(said))
            yield json.loads(path.read_text())


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_bytes(config: PretrainedConfig) -> int:
    """KV bytes of one token."""
    return config.num_hidden_layers * config.num_key_value_heads * 2 * head_dim_of(config) * DTYPE.itemsize


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(TEST_MODEL), help="checkpoint; for servers: whose tokenizer counts")
    add("--url", action="append", metavar="NAME=URL", help="a server to ask; the first is the full cache")
    add("--chat", action="store_true", help="ask as chat messages")
    add("--tasks", nargs="+", default=["ruler", "text"], help="ruler, longbench, their tasks, text (KL and perplexity)")
    add("--wording", choices=("compact", "english"), default="compact", help="compact: the test model's vocabulary")
    add("--text-file", type=Path, help="running text for haystacks and KL (English)")
    add("--longbench", type=Path, help="local checkout of the LongBench data set")
    add("--context", type=int, default=1024, help="tokens of prompt and answer")
    add("--budgets", type=int, nargs="+", default=[512, 256, 128, 64], help="tokens")
    add("--methods", nargs="+", choices=[*KNOWN, FP8], default=[*METHODS, FP8])
    add("--prefill", nargs="+", choices=("chunked", "full"), default=["chunked", "full"])
    add("--samples", type=int, default=16, help="prompts per task and seed")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--texts", type=int, default=16)
    add("--out", default="quality", help="results/NAME.json and .png")
    return parser.parse_args(argv)


def servers(urls: Sequence[str]) -> dict[str, str]:
    """Name -> address. Raises ValueError on an argument without a name."""
    for pair in urls:
        if not pair.partition("=")[0] or "://" not in pair.partition("=")[2]:
            raise ValueError(f"--url {pair} is not NAME=URL, e.g. full=http://127.0.0.1:8000")
    return dict(pair.split("=", 1) for pair in urls)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    tokenizer, config = AutoTokenizer.from_pretrained(args.model), AutoConfig.from_pretrained(args.model)
    asked, texts = questions.make(args, tokenizer)
    if args.url:
        named = servers(args.url)
        plan = [Cell(name) for name in named]
        raws = (ask(Endpoint(url, tokenizer), asked, texts) for url in named.values())
    else:
        plan = list(cells(args.methods, args.budgets, args.prefill, args.context, head_dim_of(config)))
        raws = answers_of_engines(plan, args.model, args.context, asked, texts)
    results, full = [], None
    for cell, raw in zip(plan, raws, strict=True):
        full = full or raw
        results.append(judge(cell, raw, full, asked))
    print(show.tables(results))
    keys = ("context", "wording", "chat", "samples", "seeds", "texts")
    settings = {
        "model": Path(args.model).name,
        **{k: getattr(args, k) for k in keys},
        "token_bytes": token_bytes(config),
    }
    report.write(args.out, {**settings, "cells": [r.to_json() for r in results]}, show.targets(results))
    if not args.url:
        show.plot(results, token_bytes(config), report.RESULTS / f"{args.out}.png")


if __name__ == "__main__":
    main()
