"""Results as a table: every figure with its standard error over the items."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import report
from quality.cells import Cell
from quality.results import mean_error

Items = list[dict[str, Any]]
"""By item: `loss`, `found`, `kl` (verdict.py)."""
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
