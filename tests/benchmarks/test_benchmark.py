"""The records of benchmarks: what is derived follows from the committed results, and a wrong answer stops everything."""

import importlib
import importlib.util
import json
from pathlib import Path

import bench
import pytest
import report
from benchmark import Benchmark


def module(name: str) -> str:
    return bench.BENCHMARKS[name].steps[-1].module


def is_record(name: str) -> bool:
    spec = importlib.util.find_spec(module(name))
    return "\nBENCHMARK = " in Path(spec.origin).read_text()


def record(name: str) -> Benchmark:
    return importlib.import_module(module(name)).BENCHMARK


RECORDS = [name for name in bench.BENCHMARKS if is_record(name)]


def test_records_are_found():
    assert {"serving", "load", "kernels", "store", "dashboard"} < set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_targets_tables_and_pictures_follow_from_the_committed_results(name, tmp_path, monkeypatch, capsys):
    committed = json.loads((report.RESULTS / f"{name}.json").read_text())
    one = record(name)
    assert one.name == name
    assert json.loads(json.dumps(one.targets(one.known()))) == committed["targets"]
    for heading, *rows in one.tables(one.known()):
        assert rows and all(len(row) == len(heading) for row in rows)
    shown = tmp_path / f"{name}.json"
    shown.write_text(json.dumps(committed | {"targets": []}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    one.run(["--show"])
    assert json.loads(shown.read_text()) == committed
    said = capsys.readouterr().out
    assert all(target["name"] in said for target in committed["targets"])
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert pictures == ([f"{name}.png"] if one.draw else [])


def test_nothing_is_measured_or_written_where_an_answer_is_wrong(tmp_path, monkeypatch):
    def wrong() -> None:
        raise AssertionError("wrong answer")

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    measured = []
    with pytest.raises(AssertionError, match="wrong answer"):
        Benchmark("x", measured.append, lambda results: [], gate=wrong).run([])
    assert not measured and not list(tmp_path.iterdir())


def test_small_cells_have_a_result_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [{"cell": "a", "seconds": 0.5}]
    one = Benchmark(
        "x", lambda args: rows[: 1 + args.quick], lambda rows: [report.rows_of(rows)],
        lambda rows: [report.target("slow", rows[0]["seconds"], 1.0)], lambda rows, axes: axes.plot([1, 2]), quick=True,
    )  # fmt: skip
    one.run(["--quick"])
    assert [path.name for path in tmp_path.iterdir()] == ["x_quick.json"]
    one.run([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png", "x_quick.json"]
    said = capsys.readouterr().out
    assert "| a    | 0.500" in said and "MISSED slow: 0.500 (target 1.0)" in said
    assert one.known() == rows
