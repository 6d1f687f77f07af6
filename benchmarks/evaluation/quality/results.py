"""What a cell's answers are worth: scores per question, so that two methods can be compared pair by pair."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from divergence import mean_kl
from evaluation.quality.cells import Cell
from evaluation.quality.questions import Question


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error). The error of a single value is unknown: infinite."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Result:
    """scores: of every question, by task, in the same order for every method. kl, perplexity: None without texts."""

    cell: Cell
    scores: dict[str, list[float]]
    kl: float | None
    perplexity: float | None

    @property
    def tasks(self) -> dict[str, float]:
        """Accuracy of every task."""
        return {task: statistics.fmean(scores) for task, scores in self.scores.items()}

    @property
    def mean(self) -> float | None:
        """Mean over tasks, each counting the same; None without questions."""
        return statistics.fmean(self.tasks.values()) if self.scores else None

    @property
    def error(self) -> float | None:
        """Standard error of `mean`."""
        errors = [mean_error(scores)[1] for scores in self.scores.values()]
        return math.hypot(*errors) / len(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        measured = {"mean": self.mean, "error": self.error, "kl": self.kl, "perplexity": self.perplexity}
        return {**asdict(self.cell), **measured, "tasks": self.tasks}


def judge(cell: Cell, raw: dict[str, Any], full: dict[str, Any], questions: Sequence[Question]) -> Result:
    """`raw`, `full`: what this cell and the full cache said (run.py, `ask`)."""
    scores: dict[str, list[float]] = {}
    for question, said in zip(questions, raw["said"], strict=True):
        scores.setdefault(question.task, []).append(question.score(said))
    if not raw["known"]:
        return Result(cell, scores, None, None)
    return Result(cell, scores, mean_kl(full["known"], raw["known"]), math.exp(raw["loss"]))
