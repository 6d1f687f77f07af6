"""Which state and which score are worth their bytes: the simulator on the test model, everything at equal bytes.

    make bench NAME=states

Every cell holds the same bytes: what the state costs is taken from the retained tokens. Accuracy: all answer tokens are the
likeliest ones (teacher-forced, the same as greedy decoding), by the tasks model; KL: of the full cache's next-token distribution
on the second half of held-out source code, exact, by the code model; error: |attention output - exact| / |exact| per layer of
the code model, exact inputs. (On the synthetic text of the tasks model every state has the same KL: its heads are too sharp.)
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from evaluation.quality.wording import Compact
from research.prompts import Batch, task_batch
from research.simulate import Eviction, SimulatedModel
from research.states import Clusters, MomentState, State, to_bfloat16, to_int8
from test_model.code_text import held_out_rows
from tqdm import tqdm
from transformers import AutoTokenizer

from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule
from momentkv_vllm.policies import Candidates, Policy
from momentkv_vllm.policies.momentkv import MomentKV

MODELS = Path(__file__).resolve().parent.parent / "test_model"
TASKS = ("niah_single_3", "niah_multikey_2", "vt", "qa_1", "qa_2")
"""Some of those that the model has learned, with one right order of the answer."""
RETIRE, SINKS, OBSERVED = 16, 4, 8

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
    "7 sets by key": lambda: Clusters(7),
    "4 sets by age": lambda: Clusters(4, by_age=256),
}


class KeyDistance(MomentKV):
    """The first term of the default score alone."""

    observes = None

    def score(self, tokens: Candidates) -> torch.Tensor:
        return self._distance(tokens, tokens.keys, tokens.moments.mean_key)


class ObservedError(MomentKV):
    """The second term alone: the paper's score to zeroth order."""

    def score(self, tokens: Candidates) -> torch.Tensor:
        return tokens.attention * self._distance(tokens, tokens.values, tokens.moments.mean_value)


class Product(MomentKV):
    """Their geometric mean, attention counting from a tenth of its mean."""

    def score(self, tokens: Candidates) -> torch.Tensor:
        seen = self._relative(tokens, tokens.attention).clamp(min=0.1)
        return seen.log() + self._distance(tokens, tokens.keys, tokens.moments.mean_key).log()


class BestRank(MomentKV):
    """The better one of a token's two ranks."""

    def score(self, tokens: Candidates) -> torch.Tensor:
        ranks = [p.score(tokens).argsort(-1).argsort(-1) for p in (KeyDistance(), ObservedError())]
        return torch.maximum(*ranks).float()


SCORES: dict[str, Callable[[], Policy]] = {
    "momentkv": MomentKV,
    "key distance": KeyDistance,
    "observed error": ObservedError,
    "product": Product,
    "best rank": BestRank,
}
WINDOWS = (0.5, 0.25, 0.06)
"""Share of the budget."""


@dataclass(frozen=True)
class Cell:
    score: str
    state: str
    budget: int
    prefill: str = "chunked"
    window: float = WINDOWS[0]

    @property
    def name(self) -> str:
        return f"{self.score} / {self.state} / window {self.window} / {self.budget} / {self.prefill}"


def eviction(cell: Cell, dim: int, prompt_tokens: int) -> Eviction:
    """The budget in single tokens: pages of one token, the state paid with as many as it costs."""
    make = STATES[cell.state]
    cost = make().tokens(dim) if make else 0
    window = max(2 * RETIRE, round(cell.window * cell.budget))
    schedule = PageSchedule(
        1, cell.budget - cost - window, cost, window, RETIRE, 0 if cell.prefill == "chunked" else ANY_PROMPT
    )
    return Eviction(SCORES[cell.score](), schedule, make, SINKS, OBSERVED, prompt_tokens)


def accuracy(model: SimulatedModel, batch: Batch, how: Eviction | None) -> float:
    """Share of rows with every answer token right."""
    places = slice(batch.ids.shape[1] - batch.answer - 1, batch.ids.shape[1] - 1)
    said = model.log_probs(batch.ids, places, how).argmax(-1)
    return (said == batch.ids[:, -batch.answer :]).all(1).float().mean().item()


def divergence(model: SimulatedModel, ids: torch.Tensor, full: torch.Tensor, how: Eviction) -> dict[str, float]:
    """KL to the full cache on the second half of `ids`, and the attention error of every layer."""
    half = slice(ids.shape[1] // 2, None)
    kl = (full.exp() * (full - model.log_probs(ids, half, how))).sum(-1).mean().item()
    model.measure_errors, model.layer_errors = True, []
    model.log_probs(ids[:8], half, how)
    model.measure_errors = False
    return {"kl": kl, **{f"error {i}": e for i, e in enumerate(model.layer_errors)}}


def cells(budgets: Sequence[int]) -> list[Cell]:
    """States behind the default score, then windows and scores behind the default state."""
    out = [Cell("momentkv", s, b) for b in budgets for s in STATES]
    out += [Cell("momentkv", "zeroth", b, window=w) for b in budgets for w in WINDOWS[1:]]
    others = list(SCORES)[1:]
    return out + [Cell(s, "zeroth", b, p) for b in budgets for s in others for p in ("chunked", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="repeat only cells whose name contains this")
    args = parser.parse_args()
    tasks_model, text_model = (SimulatedModel(MODELS / name) for name in ("checkpoint", "code_checkpoint"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "checkpoint")
    tasks = {t: task_batch(t, tokenizer, Compact(), args.context, args.samples, args.seed) for t in TASKS}
    ids = held_out_rows(
        AutoTokenizer.from_pretrained(MODELS / "code_checkpoint"), args.context, args.samples // 2, args.seed
    )
    full = text_model.log_probs(ids, slice(args.context // 2, None), None)
    result = json.loads((report.RESULTS / "states.json").read_text())["results"]["cells"] if args.only else {}
    result["full cache"] = {t: accuracy(tasks_model, b, None) for t, b in tasks.items()}
    dim = tasks_model.model.config.head_dim
    for cell in tqdm([c for c in cells(args.budgets) if args.only in c.name]):
        found = {t: accuracy(tasks_model, b, eviction(cell, dim, args.context - b.answer)) for t, b in tasks.items()}
        found["mean"] = sum(found.values()) / len(found)
        found |= divergence(text_model, ids, full, eviction(cell, dim, args.context // 2))
        result[cell.name] = found
        tqdm.write(f"{cell.name:60} mean {found['mean']:.3f}  KL {found['kl']:.4f}")
        report.write("states", {"context": args.context, "samples": args.samples, "cells": result})


if __name__ == "__main__":
    main()
