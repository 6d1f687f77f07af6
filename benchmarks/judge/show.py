"""Results as a table: every figure with its standard error."""

from dataclasses import asdict, dataclass
from typing import Any

import report
from quality.cells import Cell
from quality.results import mean_error

MEASURES = {"text": ("kl", "loss"), "answers": ("loss",)}
"""What is shown of a kind, by the beginning of its name; of needles, the others, what is found and the digits' loss."""
HEADINGS = {"kl": "KL", "loss": "-log p", "found": "found"}


@dataclass(frozen=True)
class Row:
    """One cell. results: by kind and item, `loss`, `found`, `kl` (verdict.py)."""

    cell: Cell
    results: dict[str, list[dict[str, Any]]]

    def figures(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By kind and measure: mean over the items and its standard error."""
        measures = ("kl", "loss", "found")
        return {
            kind: {m: mean_error([float(item[m]) for item in items]) for m in measures}
            for kind, items in self.results.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.cell), "name": self.cell.name, "figures": self.figures(), "items": self.results}


def shown(kind: str) -> tuple[str, ...]:
    return MEASURES.get(kind.split("_")[0], ("found", "loss"))


def table(rows: list[Row]) -> str:
    """Markdown; -log p is per counted token (its exponential is the perplexity), +- is one standard error."""
    kinds = list(rows[0].results)
    heads = [f"{kind}: {HEADINGS[m]}" for kind in kinds for m in shown(kind)]
    lines = [["what", *heads]]
    for row in rows:
        figures = row.figures()
        pairs = [figures[kind][m] for kind in kinds for m in shown(kind)]
        lines.append([row.cell.name, *(f"{mean:.3f} +-{error:.3f}" for mean, error in pairs)])
    return report.table(lines)
