"""How many draft tokens the model accepts, with stock vLLM and under a budget: the real model, drafted by itself in 4 bits.

    PYTHONPATH=benchmarks python -m serving.drafts [--tokens 96]

Prompts are stretches of our guides. Each configuration has a process of its own; what its metrics count goes into the results.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import child
from benchmark import Benchmark
from real_model import folder

GUIDES = Path(__file__).parents[2] / "docs"
PROMPTS, PROMPT_TOKENS, DRAFTS, NEW = 4, 800, 4, 96
BUDGETS = (None, 256)
"""None: stock vLLM."""
RETIRE = 64
"""Tokens between two evictions; 16 of them are observed, and not drafted."""
COUNTED = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
BITS, GROUP = 4, 32


def make_draft_model(model: Path, target: Path) -> None:
    """`model` with every matrix rounded to `BITS` bits in groups of `GROUP` numbers of a row."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target, dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    most = 2 ** (BITS - 1) - 1
    for name, x in weights.items():
        if x.dim() == 2 and "embed" not in name:
            parts = x.float().unflatten(1, (-1, GROUP))
            step = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
            weights[name] = ((parts / step).round() * step).flatten(1).to(x.dtype)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def prompts(model: Path, tokens: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    text = "\n".join(page.read_text() for page in sorted(GUIDES.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    return [ids[i * tokens : (i + 1) * tokens] for i in range(PROMPTS)]


def count(task: dict[str, Any]) -> dict[str, Any]:
    """In the child."""
    from vllm import LLM, SamplingParams

    model = Path(task["model"])
    eviction = task["budget"] and {
        "kv_eviction": {"policy": "momentkv", "budget_tokens": task["budget"], "retire_tokens": RETIRE}
    }
    drafts = {"method": "draft_model", "model": task["drafts"], "num_speculative_tokens": DRAFTS}
    llm = LLM(
        str(model), additional_config=eviction or {}, speculative_config=drafts, max_model_len=4096, dtype="bfloat16",
        enforce_eager=True, disable_log_stats=False, gpu_memory_utilization=0.2, enable_prefix_caching=False,
    )  # fmt: skip
    given = [{"prompt_token_ids": ids} for ids in prompts(model, PROMPT_TOKENS)]
    answers = llm.generate(
        given, SamplingParams(temperature=0.0, max_tokens=task["tokens"], ignore_eos=True), use_tqdm=False
    )
    values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    made = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return {"tokens": made} | {key: values[f"vllm:spec_decode_{key}"] for key in COUNTED}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    model, found = folder.find(), []
    if model is None:
        raise SystemExit(folder.WHY_NOT)
    with tempfile.TemporaryDirectory() as made:
        make_draft_model(model, Path(made) / "draft")
        for budget in BUDGETS:
            task = {"model": str(model), "drafts": str(Path(made) / "draft"), "budget": budget, "tokens": args.tokens}
            found.append({"budget": budget} | next(iter(child.results("serving.drafts", task))))
            print(json.dumps(found[-1]), flush=True)
    return found


def tables(found: Sequence[dict[str, Any]]) -> list[list[list]]:
    heading = ["budget", "drafted", "accepted", "share", "tokens per step"]
    rows = []
    for cell in found:
        drafted, accepted = cell["num_draft_tokens"], cell["num_accepted_tokens"]
        steps = cell["tokens"] - accepted
        rows.append(
            [cell["budget"] or "stock", int(drafted), int(accepted), f"{accepted / max(1, drafted):.2f}",
             f"{cell['tokens'] / steps:.2f}"]
        )  # fmt: skip
    return [[heading, *rows]]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=NEW, help="of each answer")


BENCHMARK = Benchmark("drafts", measure, tables, options=options)

if __name__ == "__main__":
    asked = child.task()
    if asked:
        child.tell(count(asked))
    else:
        BENCHMARK.run()
