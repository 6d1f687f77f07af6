"""Results as a table: every figure with its standard error over the items."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import report
from evaluation.quality.cells import Cell
from evaluation.quality.results import mean_error

Items = list[dict[str, Any]]
"""By item: `loss`, `found`, `kl` (calibrate/verdict.py)."""
COLUMNS = {"text": ("KL", "perplexity", "x full"), "answers": ("-log p", "more than full")}
"""By the beginning of a kind's name."""
NEEDLES = ("found", "-log p")


@dataclass(frozen=True)
class Row:
    """One cell; results and the full cache's, by kind."""

    cell: Cell
    results: dict[str, Items]
    full: dict[str, Items]

    def figures(self, kind: str) -> dict[str, tuple[float, float]]:
        """(mean, standard error) by column. What compares with the full cache is paired: its error is that of the
        differences. -log p is per counted token."""
        items, full = self.results[kind], self.full[kind]
        loss = mean_error([i["loss"] for i in items])
        more = mean_error([i["loss"] - f["loss"] for i, f in zip(items, full, strict=True)])
        every = {
            "KL": mean_error([i["kl"] for i in items]),
            "perplexity": _exponential(loss),
            "x full": _exponential(more),
            "-log p": loss,
            "more than full": more,
            "found": mean_error([float(i["found"]) for i in items]),
        }
        return {column: every[column] for column in columns(kind)}

    def to_json(self) -> dict[str, Any]:
        figures = {kind: self.figures(kind) for kind in self.results}
        return {**asdict(self.cell), "name": self.cell.name, "figures": figures, "items": self.results}


def columns(kind: str) -> tuple[str, ...]:
    return COLUMNS.get(kind.split("_")[0], NEEDLES)


def table(rows: list[Row]) -> str:
    """Markdown; +- is one standard error."""
    kinds = list(rows[0].results)
    lines = [["what", *(f"{kind}: {column}" for kind in kinds for column in columns(kind))]]
    for row in rows:
        pairs = [pair for kind in kinds for pair in row.figures(kind).values()]
        lines.append([row.cell.name, *(f"{mean:.3f} +-{error:.3f}" for mean, error in pairs)])
    return report.table(lines)


def _exponential(pair: tuple[float, float]) -> tuple[float, float]:
    """Of a mean and its error."""
    mean, error = pair
    return math.exp(mean), math.exp(mean) * error


def overview(measured: list[dict[str, Any]]) -> str:
    """Markdown of a results file's cells: what keeps all tokens, then what evicts, at every budget; in `chunked` prefill where
    nothing else is said. Codes and digits are the mean over the needles of 1k; +- is one standard error over items."""
    keeping = [c for c in measured if not c["prefill"]]
    cells = [c for c in measured if c["prefill"]]
    budgets = sorted({c["budget_tokens"] for c in cells}, reverse=True)
    head = ["", *(f"KL {b}" for b in budgets), *(f"codes {b}" for b in budgets), *(f"digits {b}" for b in budgets)]
    lines = [[*head, *(f"answers {b}" for b in budgets)]]
    lines += [[c["method"], *summary([c] * len(budgets))] for c in keeping]
    for method, prefill in dict.fromkeys((c["method"], c["prefill"]) for c in cells):
        of = {c["budget_tokens"]: c for c in cells if (c["method"], c["prefill"]) == (method, prefill)}
        name = method if prefill == "chunked" else f"{method}, {prefill} prefill"
        lines.append([name, *summary([of.get(b) for b in budgets])])
    return report.table(lines)


def summary(cells: list[dict[str, Any] | None]) -> list[str]:
    """Of one method by budget: KL, share of codes found, -log p per digit, nats per token of answers over the full cache's."""

    def needles(cell: dict[str, Any]) -> list[dict[str, Any]]:
        return [item for kind, items in cell["items"].items() if kind.endswith("_1k") for item in items]

    columns = (
        ("{:.3f} +-{:.3f}", lambda c: c["figures"]["text_2k"]["KL"]),
        ("{:.2f} +-{:.2f}", lambda c: mean_error([float(i["found"]) for i in needles(c)])),
        ("{:.2f} +-{:.2f}", lambda c: mean_error([i["loss"] for i in needles(c)])),
        ("{:.2f} +-{:.2f}", lambda c: c["figures"]["answers_2k"]["more than full"]),
    )
    return ["-" if c is None else form.format(*column(c)) for form, column in columns for c in cells]
