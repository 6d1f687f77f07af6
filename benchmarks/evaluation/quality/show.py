"""Tables, targets and plots of the results."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from evaluation.quality.cells import BASELINES, FP8, FULL, OFF, OURS
from evaluation.quality.results import Result, mean_error

NOISE_ERRORS = 2
"""A difference is beyond noise from so many standard errors on."""
KL_SHARE, LEAD = 0.5, 0.03

Group = dict[str, Result]
"""Results of one budget and prefill mode by method."""


def tables(results: Sequence[Result]) -> str:
    """One Markdown table per budget, prefill mode and column; a single one if nothing evicts (endpoints)."""
    still = [r for r in results if not r.cell.prefill]
    blocks = []
    for column in ("bytes", "tokens"):
        for (budget, prefill), group in groups(results, column).items():
            shown = [
                r for r in still if r.cell.method == FULL or (r.cell.budget_tokens == budget and column == "bytes")
            ]
            heading = f"### budget {budget} tokens, {prefill} prefill, equal {column}"
            blocks.append(f"{heading}\n\n{_table([*shown, *group.values()])}")
    return "\n\n".join(blocks or [_table(still)])


def _table(results: Sequence[Result]) -> str:
    tasks = list(results[0].scores)
    rows: list[list[Any]] = [["", "mean", "+-", "KL", "perplexity", *tasks]]
    for r in results:
        kl = "-" if r.kl is None else f"{r.kl:.5f}"
        measured = ["-" if x is None else x for x in (r.mean, r.error)]
        rows.append([r.cell.method, *measured, kl, "-" if r.perplexity is None else r.perplexity, *r.tasks.values()])
    return report.table(rows)


def overview(accuracy: dict[str, Any], text: dict[str, Any]) -> str:
    """The README's table from two written results: mean accuracy by budget and prefill mode, KL by budget, at equal bytes."""
    cells = [c for c in accuracy["cells"] if c["prefill"] and c["column"] == "bytes"]
    columns = list(dict.fromkeys((c["budget_tokens"], c["prefill"]) for c in cells))
    means = {(c["method"], c["budget_tokens"], c["prefill"]): f"{c['mean']:.3f}" for c in cells}
    of_text = [c for c in text["cells"] if c["prefill"] and c["column"] == "bytes"]
    budgets = list(dict.fromkeys(c["budget_tokens"] for c in of_text))
    kls = {(c["method"], c["budget_tokens"]): f"{c['kl']:.3f}" for c in of_text}
    rows = [["", *(f"{b}, {p}" for b, p in columns), *(f"KL {b}" for b in budgets)]]
    for method in dict.fromkeys(c["method"] for c in cells):
        row = [means.get((method, *column), "-") for column in columns]
        rows.append([method, *row, *(kls.get((method, b), "-") for b in budgets)])
    (full,) = [c for c in accuracy["cells"] if c["method"] == FULL]
    rows.insert(1, [FULL, *[f"{full['mean']:.3f}"] * len(columns), *["0"] * len(budgets)])
    return report.table(rows)


def groups(results: Sequence[Result], column: str = "bytes") -> dict[tuple[int, str], Group]:
    """(budget, prefill) -> method -> result. A method without a state has the same cell in both columns."""
    found: dict[tuple[int, str], Group] = {}
    for wanted in ("bytes", column):
        for r in results:
            if r.cell.prefill and r.cell.column == wanted:
                found.setdefault((r.cell.budget_tokens, r.cell.prefill), {})[r.cell.method] = r
    return found


@dataclass(frozen=True)
class Difference:
    """Ours minus the other's, question by question."""

    label: str
    mean: float
    error: float

    @property
    def margin(self) -> float:
        """Negative: lost beyond noise."""
        return self.mean + NOISE_ERRORS * self.error


def differences(name: str, ours: Result, others: Sequence[Result], cell: str) -> Iterator[Difference]:
    """For every task against its best other method. The best of several is lucky too: this leans against ours."""
    for task, scores in ours.scores.items():
        best = max(others, key=lambda r: r.tasks[task])
        pairs = [a - b for a, b in zip(scores, best.scores[task], strict=True)]
        yield Difference(f"{name}: {task}, {cell}, against {best.cell.method}", *mean_error(pairs))


def _never_lost(name: str, found: Sequence[Difference]) -> list[dict[str, Any]]:
    if not found:
        return []
    worst = min(found, key=lambda d: d.margin)
    lost = sum(d.margin < 0 for d in found)
    return [
        report.target(f"{name}: cells lost beyond noise, of {len(found)}", lost, 0, at_least=False),
        report.target(f"{worst.label} (the worst; limit: noise)", worst.mean, -NOISE_ERRORS * worst.error),
    ]


def targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The default method at equal bytes against the best baseline, and against itself without correction."""
    to_best, to_off, leads, kls = [], [], [], []
    for (budget, prefill), group in groups(results).items():
        ours, baselines = group.get(OURS), [group[b] for b in BASELINES if b in group]
        cell = f"budget {budget} {prefill}"
        if ours and baselines and ours.scores:
            to_best += differences("against baselines", ours, baselines, cell)
            leads.append(ours.mean - max(b.mean for b in baselines))
        if ours and OFF in group:
            to_off += differences("correction", ours, [group[OFF]], cell)
        if ours and baselines and ours.kl is not None:
            best = min(baselines, key=lambda r: r.kl)
            # Nothing to halve where the best baseline evicts nothing that matters.
            if best.kl > 0:
                kls.append((ours.kl / best.kl, f"{cell}, against {best.cell.method}"))
    rows = _never_lost("against baselines", to_best) + _never_lost("correction", to_off)
    if leads:
        rows.append(report.target("mean lead over the best baseline", statistics.fmean(leads), LEAD))
    if kls:
        ratio, cell = max(kls)
        rows.append(report.target(f"KL / best baseline's, worst: {cell}", ratio, KL_SHARE, at_least=False))
    return rows


def plot(results: Sequence[Result], token_bytes: int, path: Path) -> None:
    """Accuracy against budget and KL against bytes, at equal bytes, one column of panels per prefill mode."""
    grouped = groups(results)
    modes = list(dict.fromkeys(prefill for _, prefill in grouped))
    full, *_ = [r for r in results if r.cell.method == FULL]
    size, shared = (6 * len(modes), 8), {"squeeze": False, "sharex": "row", "sharey": "row"}
    with report.picture(path, 2, len(modes), size, **shared) as axes:
        for (above, below), mode in zip(axes.T, modes, strict=True):
            for number, method in enumerate(dict.fromkeys(r.cell.method for r in results if r.cell.prefill)):
                line = sorted((b, g[method]) for (b, m), g in grouped.items() if m == mode and method in g)
                style = {"marker": "os^dv"[number % 5], "linewidth": 2.5 if method == OURS else 1, "label": method}
                _line(above, [(b, r.mean) for b, r in line], style)
                _line(below, [(b * token_bytes, r.kl) for b, r in line], style)
            for r in [r for r in results if r.cell.method == FP8]:
                _line(above, [(r.cell.budget_tokens, r.mean)], {"marker": "*", "color": "black", "label": FP8})
                _line(below, [(r.cell.budget_tokens * token_bytes, r.kl)], {"marker": "*", "color": "black"})
            if full.mean is not None:
                above.axhline(full.mean, color="grey", linestyle=":", label=FULL)
            above.set(title=f"{mode} prefill, equal bytes", xlabel="budget, tokens", ylabel="mean accuracy")
            below.set(xlabel="KV bytes of a sequence", ylabel="KL to the full cache", yscale="log")
            for axis, unit in ((above, 1), (below, token_bytes)):
                ticks = sorted({b * unit for b, _ in grouped})
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes[0, 0].legend(fontsize="small")


def _line(axes: Any, points: Sequence[tuple[float, float | None]], style: dict[str, Any]) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), **style)
