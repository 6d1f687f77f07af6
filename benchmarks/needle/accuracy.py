"""Accuracy and KL to the full cache under a budget of a quarter of the context, in a real vLLM engine.

    python benchmarks/needle/accuracy.py [--samples 40] [--context 1000] [--budget 256]

Every cell is one engine (policy, prefill mode, correction), every prompt a fresh document; an answer counts when all its
tokens are right. KL is over the prompt log-probabilities in the second half of running text, the 20 likeliest tokens of the
full cache ("full" prefill reads its prompt exactly, so it has none).
"""

import argparse
import gc
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
from divergence import mean_kl  # noqa: E402
from tasks import Sample, sample  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

TASKS = ("needle", "multikey", "copy")
TEXTS = 16
CELLS: dict[str, dict] = {
    "full cache": {},
    "momentkv chunked": {"policy": "momentkv"},
    "momentkv chunked, correction off": {"policy": "momentkv", "correction": "off"},
    "momentkv chunked, zeroth": {"policy": "momentkv", "correction": "zeroth"},
    "momentkv full": {"policy": "momentkv", "prefill": "full"},
    "paper full": {"policy": "paper"},
    "paper chunked": {"policy": "paper", "prefill": "chunked"},
    "streamingllm": {"policy": "streamingllm"},
}


def run_cell(model: Path, eviction: dict, budget: int, groups: dict[str, list[Sample]]) -> dict:
    """Accuracy per task and the next-token distributions on text."""
    options = {"additional_config": {"kv_eviction": {**eviction, "budget_tokens": budget}}} if eviction else {}
    llm = LLM(
        str(model),
        enforce_eager=True,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        num_gpu_blocks_override=2000,
        **options,
    )
    result: dict = {}
    for task, samples in groups.items():
        if task == "text":
            outputs = llm.generate([s.prompt for s in samples], SamplingParams(max_tokens=1, prompt_logprobs=20))
            halves = [o.prompt_logprobs[len(o.prompt_logprobs) // 2 :] for o in outputs]
            result["text"] = [{t: p.logprob for t, p in place.items()} for half in halves for place in half]
            continue
        length = max(len(s.answer.split()) for s in samples)
        outputs = llm.generate([s.prompt for s in samples], SamplingParams(temperature=0, max_tokens=length))
        right = [o.outputs[0].text.split() == s.answer.split() for o, s in zip(outputs, samples, strict=True)]
        result[task] = sum(right) / len(right)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    groups = {t: [sample(t, rng, args.context) for _ in range(args.samples)] for t in TASKS}
    groups["text"] = [sample("text", rng, args.context) for _ in range(TEXTS)]
    cells = {}
    for name, eviction in CELLS.items():
        print(f"-- {name}", flush=True)
        cells[name] = run_cell(args.model, eviction, args.budget, groups)
    full = cells["full cache"]["text"]
    for name, cell in cells.items():
        text = cell.pop("text")
        cell["kl"] = mean_kl(full, text) if CELLS[name].get("prefill") != "full" and name != "paper full" else None
    rows = [[n, *(c[t] for t in TASKS), "-" if c["kl"] is None else f"{c['kl']:.4f}"] for n, c in cells.items()]
    print(report.table([["", *TASKS, "KL"], *rows]))
    ours, stream = cells["momentkv chunked"], cells["streamingllm"]
    baselines = [c["kl"] for n, c in cells.items() if c["kl"] and not n.startswith("momentkv")]
    targets = [
        report.target(
            "momentkv chunked: KL against the best other policy", ours["kl"] / min(baselines), 0.5, at_least=False
        ),
        report.target("full cache, needle", cells["full cache"]["needle"], 0.95),
        report.target("full cache, multikey", cells["full cache"]["multikey"], 0.95),
        report.target("momentkv chunked at 1/4, multikey", ours["multikey"], 0.95),
        report.target("momentkv chunked at 1/4, copy", ours["copy"], 0.90),
        report.target("streamingllm at 1/4, multikey (far below)", stream["multikey"], 0.6, at_least=False),
    ]
    settings = {"context": args.context, "budget": args.budget, "samples": args.samples, "cells": cells}
    report.write("needle_accuracy", settings, targets)


if __name__ == "__main__":
    main()
