"""A benchmark as a record: what is checked, measured, and derived from the results. `make bench NAME=...` runs it."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import report

Results = Any


def nothing(*_: Any) -> tuple:
    return ()


@dataclass(frozen=True)
class Benchmark:
    """name: of the target, of results/NAME.json and of NAME.png.

    measure: options -> results. Before it runs `gate`, which raises where an answer is wrong: then nothing is timed or written.
    tables (the first row of each its heading), targets and draw: from the results alone, so that they can be made again.
    quick: `--quick` measures small cells, into results/NAME_quick.json. options: adds a benchmark's own.
    """

    name: str
    measure: Callable[[argparse.Namespace], Results]
    tables: Callable[[Results], Sequence[Sequence[Sequence[Any]]]]
    targets: Callable[[Results], Sequence[dict[str, Any]]] = nothing
    draw: Callable[[Results, Any], None] | None = None
    panels: int = 1
    size: tuple[float, float] = (11, 4)
    gate: Callable[[], object] = nothing
    quick: bool = False
    options: Callable[[argparse.ArgumentParser], object] = nothing

    def known(self, quick: bool = False) -> Results:
        """Those of the last run."""
        return json.loads((report.RESULTS / f"{self.name}{'_quick' * quick}.json").read_text())["results"]

    def run(self, argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(prog=f"make bench NAME={self.name}")
        parser.add_argument("--show", action="store_true", help="table, targets and picture of the last results again")
        if self.quick:
            parser.add_argument("--quick", action="store_true", help="small cells, one repeat")
        self.options(parser)
        args = parser.parse_args(argv)
        quick = self.quick and args.quick
        if args.show:
            results = self.known(quick)
        else:
            self.gate()
            results = self.measure(args)
        for rows in self.tables(results):
            print(report.table(rows), "\n")
        if args.show:
            report.write_targets(self.name + "_quick" * quick, self.targets(results))
        else:
            report.write(self.name + "_quick" * quick, results, self.targets(results))
        if self.draw and not quick:
            with report.picture(report.RESULTS / f"{self.name}.png", 1, self.panels, self.size) as axes:
                self.draw(results, axes)
