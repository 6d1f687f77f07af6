"""Which state and which score are worth their bytes: the simulator on the test model, everything at equal bytes.

    make bench-states

Every cell holds the same bytes: what the state costs is taken from the retained tokens. Accuracy: all answer tokens are the
likeliest ones (teacher-forced, the same as greedy decoding); KL: of the full cache's next-token distribution on the second half
of running text, exact; error: |attention output - exact| / |exact| per layer, exact inputs.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from quality.prompts import Batch, task_batch, text_batch
from quality.simulate import Eviction, SimulatedModel
from quality.states import Clusters, MomentState, State, to_bfloat16, to_int8
from quality.wording import Compact
from tqdm import tqdm
from transformers import AutoTokenizer

from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.policies import POLICIES, Candidates, Policy

HERE = Path(__file__).resolve().parent
TASKS = ("niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery", "vt", "qa_1", "qa_2")
"""Those with one right order of the answer."""
WINDOW, RETIRE, SINKS = 16, 16, 4

STATES: dict[str, Callable[[], State] | None] = {
    "none": None,
    "zeroth": lambda: MomentState(0),
    "zeroth + key variance": lambda: MomentState(0, key_variance=True),
    "first, bfloat16": lambda: MomentState(1, 2, to_bfloat16),
    "first, int8": lambda: MomentState(1, 1, to_int8),
    "first, int8, no trust region": lambda: MomentState(1, 1, to_int8, limit=False),
    "first, int8 + key variance": lambda: MomentState(1, 1, to_int8, key_variance=True),
    "first, rank 1": lambda: MomentState(1, rank=1),
    "first, rank 2": lambda: MomentState(1, rank=2),
    "first, rank 4": lambda: MomentState(1, rank=4),
    "first, rank 8": lambda: MomentState(1, rank=8),
    "4 sets by key": lambda: Clusters(4),
    "8 sets by key": lambda: Clusters(8),
    "4 sets by age": lambda: Clusters(4, by_age=256),
}


class Blend(Policy):
    """attention^(1 - w) * distance^w."""

    needs_means = True
    needs_attention = True

    def __init__(self, weight: float, all_queries: bool) -> None:
        self.weight, self.observes_all_queries = weight, all_queries

    def score(self, tokens: Candidates) -> torch.Tensor:
        distance = POLICIES["momentkv"]().score(tokens).log()
        return self.weight * distance + (1 - self.weight) * (tokens.attention + 1e-9).log()


class ValueDistance(Policy):
    """Distance of key and value together, each over its own spread."""

    needs_means = True

    def score(self, tokens: Candidates) -> torch.Tensor:
        keys = POLICIES["momentkv"]().score(tokens)
        swapped = Candidates(**{**vars(tokens), "keys": tokens.values, "moments": tokens.moments})
        first = (tokens.moments.count == 0)[:, None, None]
        mean = torch.where(first, swapped.keys.mean(2), tokens.moments.mean_value)
        values = (tokens.values - mean.unsqueeze(2)).norm(dim=-1)
        return keys / keys.mean(-1, keepdim=True) + values / values.mean(-1, keepdim=True)


SCORES: dict[str, Callable[[], Policy]] = {
    "momentkv": POLICIES["momentkv"],
    "distance in key and value": ValueDistance,
    "window attention x distance, 0.5": lambda: Blend(0.5, False),
    "window attention x distance, 0.8": lambda: Blend(0.8, False),
    "all attention x distance, 0.5": lambda: Blend(0.5, True),
    "all attention x distance, 0.8": lambda: Blend(0.8, True),
    "all attention x distance, 0.95": lambda: Blend(0.95, True),
}


@dataclass(frozen=True)
class Cell:
    score: str
    state: str
    budget: int
    prefill: str

    @property
    def name(self) -> str:
        return f"{self.score} / {self.state} / {self.budget} / {self.prefill}"


def eviction(cell: Cell, dim: int, prompt_tokens: int) -> Eviction:
    """The budget in single tokens: pages of one token, the state paid with as many as it costs."""
    make = STATES[cell.state]
    cost = make().tokens(dim) if make else 0
    window = WINDOW + RETIRE
    schedule = PageSchedule(1, cell.budget - cost - window, cost, window, RETIRE, cell.prefill == "chunked")
    return Eviction(SCORES[cell.score](), schedule, make, SINKS, prompt_tokens=prompt_tokens)


def accuracy(model: SimulatedModel, batch: Batch, how: Eviction | None) -> float:
    """Share of rows with every answer token right."""
    places = slice(batch.ids.shape[1] - batch.answer - 1, batch.ids.shape[1] - 1)
    said = model.log_probs(batch.ids, places, how).argmax(-1)
    return (said == batch.ids[:, -batch.answer :]).all(1).float().mean().item()


def run_cell(
    model: SimulatedModel, cell: Cell, tasks: dict[str, list[Batch]], text: list[Batch], full: list[torch.Tensor]
) -> dict[str, float]:
    """Accuracy of every task, KL and attention error on text."""
    dim = model.model.config.head_dim
    result = {}
    for task, batches in tasks.items():
        length, answer = batches[0].ids.shape[1], batches[0].answer
        how = eviction(cell, dim, length - answer)
        result[task] = sum(accuracy(model, b, how) for b in batches) / len(batches)
    half = text[0].ids.shape[1] // 2
    how = eviction(cell, dim, half)
    kl = [
        (want.exp() * (want - model.log_probs(b.ids, slice(half, None), how))).sum(-1).mean().item()
        for b, want in zip(text, full, strict=True)
    ]
    model.measure_errors, model.layer_errors = True, []
    model.log_probs(text[0].ids, slice(half, None), how)
    model.measure_errors = False
    errors = {f"error {i}": e for i, e in enumerate(model.layer_errors)}
    return {**result, "mean": sum(result.values()) / len(result), "kl": sum(kl) / len(kl), **errors}


def cells(context: int) -> list[Cell]:
    """First the states behind the default score, then the scores behind the int8 state and none."""
    budgets = [context // n for n in (4, 8, 16)]
    both = ("chunked", "full")
    out = [Cell("momentkv", s, b, "chunked") for b in budgets for s in STATES]
    return out + [Cell(score, "first, int8", b, p) for b in budgets for score in list(SCORES)[1:] for p in both]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "test_model/checkpoint")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    args = parser.parse_args()
    tokenizer, wording = AutoTokenizer.from_pretrained(args.model), Compact()
    seeds = [args.seed * 1000 + i for i in range(args.samples // args.batch)]
    tasks = {t: [task_batch(t, tokenizer, wording, args.context, args.batch, s) for s in seeds] for t in TASKS}
    text = [text_batch(tokenizer, wording, args.context, args.batch, s) for s in seeds[:2]]
    model = SimulatedModel(args.model)
    full = [model.log_probs(b.ids, slice(args.context // 2, None), None) for b in text]
    result = {"full cache": {t: sum(accuracy(model, b, None) for b in bs) / len(bs) for t, bs in tasks.items()}}
    print({k: round(v, 3) for k, v in result["full cache"].items()}, flush=True)
    chosen = [c for c in cells(args.context) if args.only in c.name]
    for cell in tqdm(chosen):
        result[cell.name] = run_cell(model, cell, tasks, text, full)
        tqdm.write(f"{cell.name:60} {json.dumps({k: round(v, 4) for k, v in result[cell.name].items()})}")
        report.write("states", {"context": args.context, "samples": args.samples, "cells": result})


if __name__ == "__main__":
    main()
