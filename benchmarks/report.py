"""What every benchmark writes: JSON with a machine header and targets, and a table."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from momentkv_vllm.calibrate.curve import markdown

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    versions = {name: metadata.version(name) for name in ("vllm", "torch", "momentkv-vllm")}
    today = datetime.now(UTC).date().isoformat()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "date": today, **versions}


def target(name: str, value: float, limit: float, at_least: bool = True) -> dict[str, Any]:
    """One target of an issue and whether it is met."""
    return {"name": name, "value": value, "limit": limit, "ok": value >= limit if at_least else value <= limit}


def write(name: str, results: Any, targets: Sequence[dict[str, Any]] = ()) -> Path:
    """Save results/NAME.json and print the targets."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results, "targets": list(targets)}, indent=1) + "\n")
    print_targets(targets)
    print(f"written {path}")
    return path


def write_targets(name: str, targets: Sequence[dict[str, Any]]) -> None:
    """Those of results/NAME.json anew, from its results; print them. The machine stays the one that measured."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"targets": list(targets)}, indent=1) + "\n")
    print_targets(targets)


def print_targets(targets: Sequence[dict[str, Any]]) -> None:
    for t in targets:
        print(f"{'ok    ' if t['ok'] else 'MISSED'} {t['name']}: {t['value']:.3f} (target {t['limit']})")


@contextlib.contextmanager
def picture(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (11, 4), **more: Any
) -> Iterator[Any]:
    """Axes, as `plt.subplots` gives them, that are saved as `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, **more)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"written {path}")


def rows_of(records: Sequence[Mapping[str, Any]], *columns: str) -> list[list[Any]]:
    """Records as rows for `table`, under the names of `columns`, by default all of the first one's."""
    columns = columns or tuple(records[0])
    return [[*columns], *([record[c] for c in columns] for record in records)]


def compact(rows: Sequence[Sequence[str]]) -> str:
    """As `table`, for documents: cells may be long, so columns are not aligned."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows, the first one the heading, as a Markdown table with aligned columns."""
    return markdown([[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows])
