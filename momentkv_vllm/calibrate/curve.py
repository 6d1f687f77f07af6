"""What eviction costs at each budget, and the smallest one that costs little enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

Results = list[dict[str, Any]]
"""By item: `loss`, `found`, `kl` (verdict.py)."""


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        budget_tokens: 0: the full cache.
        kl: nats per token of the texts, to the full cache; `kl_error`: its standard error over the texts, 0 for one text.
        perplexity: over the full cache's.
        found: codes, of the `findable` ones that the full cache finds; 0 of those where the tokenizer has no digits.
        held_tokens: of one sequence, in one layer and head; `sequences` that the pool holds.
    """

    budget_tokens: int
    kl: float
    kl_error: float
    perplexity: float
    found: int
    findable: int
    held_tokens: int
    sequences: float

    @classmethod
    def of(cls, budget: int, results: tuple[Results, Results], full: tuple[Results, Results], room: dict) -> Self:
        """results, full: of the texts and of the codes, here and in the full cache."""
        (texts, codes), (full_texts, full_codes) = results, full
        kl = [text["kl"] for text in texts]
        more = fmean(text["loss"] - exact["loss"] for text, exact in zip(texts, full_texts, strict=True))
        found = [code["found"] for code, exact in zip(codes, full_codes, strict=True) if exact["found"]]
        error = stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else 0.0
        held = int(room["held_tokens"])
        return cls(budget, fmean(kl), error, math.exp(more), sum(found), len(found), held, room["sequences"])


def smallest(points: Sequence[Point], tolerance: float) -> Point | None:
    """The smallest budget from which on every larger one is within `tolerance` too; None: not even the largest is."""
    within = None
    for point in sorted(points, key=lambda p: -p.budget_tokens):
        if point.kl > tolerance:
            break
        within = point if point.budget_tokens else within
    return within


def table(points: Sequence[Point], pool_gib: float) -> str:
    """Markdown; +- is one standard error over the texts."""
    heading = ("budget", "KL", "perplexity", "codes found", "tokens held", f"sequences in {pool_gib:.3g} GiB")
    return markdown([heading, *(_cells(p) for p in points)])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns; the first row is its heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cells(point: Point) -> tuple[str, ...]:
    codes = f"{point.found} of {point.findable}" if point.findable else "-"
    held, sequences = f"{point.held_tokens}", f"{point.sequences:.1f}"
    if not point.budget_tokens:
        return "full cache", "0", "x 1", codes, held, sequences
    kl = f"{point.kl:.4f} +-{point.kl_error:.4f}"
    return str(point.budget_tokens), kl, f"x {point.perplexity:.3f}", codes, held, sequences


def bars(points: Sequence[Point], tolerance: float, width: int = 48) -> str:
    """KL by budget on a terminal; `|` is the tolerance."""
    most = max(tolerance, *(p.kl for p in points))
    mark = round(width * tolerance / most)
    lines = []
    for point in points:
        bar = ("#" * round(width * point.kl / most)).ljust(width)
        lines.append(f"{point.budget_tokens or 'full':>6} {bar[:mark]}|{bar[mark:]} {point.kl:.4f}")
    return "\n".join(lines)


def plot(points: Sequence[Point], tolerance: float, path: Path) -> None:
    """KL with its error, and the share of codes found, against the budget. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evicting = [p for p in points if p.budget_tokens]
    budgets, codes = [p.budget_tokens for p in evicting], [p.found / p.findable for p in evicting if p.findable]
    figure, panels = plt.subplots(1, 2 if codes else 1, figsize=(9 if codes else 4.5, 3.5), squeeze=False)
    left, right = panels[0, 0], panels[0, -1]
    if codes:
        right.plot(budgets, codes, marker="o")
        right.set(ylabel="codes found, of the full cache's", ylim=(-0.05, 1.05))
    left.errorbar(budgets, [p.kl for p in evicting], [p.kl_error for p in evicting], marker="o", capsize=3)
    left.axhline(tolerance, color="grey", linestyle=":", label=f"tolerance {tolerance:g}")
    left.set(ylabel="KL to the full cache, nats per token", ylim=(0, None))
    left.legend()
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, map(str, budgets))
        axes.set_xlabel("budget, tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
