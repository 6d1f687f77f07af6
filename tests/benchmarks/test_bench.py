"""The list of benchmarks: every program is there, and steps get their arguments."""

import importlib.util
import sys

import bench
import environments
import pytest


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_a_benchmark_s_programs_exist(name):
    for step in bench.BENCHMARKS[name].steps:
        assert importlib.util.find_spec(step.module) is not None, step.module


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    with pytest.raises(SystemExit, match="NAME='speed' is no benchmark: one of serving, first_token, load"):
        bench.main()


def test_steps_run_in_order_until_one_fails(monkeypatch, tmp_path):
    ran = []

    def run_step(command, output):
        ran.append((command[3:], output))
        return 3 if "fails" in command else 0

    steps = (
        bench.Step("first", output="build/x"),
        bench.Step("second", "--methods 'a, b'"),
        bench.Step("fails"),
        bench.Step("never"),
    )
    monkeypatch.setattr(bench, "run_step", run_step)
    monkeypatch.setitem(bench.BENCHMARKS, "test", bench.Benchmark("", 1, steps))
    assert bench.run("test", []) == 3
    assert ran == [(["first"], "build/x"), (["second", "--methods", "a, b"], None), (["fails"], None)]


def test_the_last_step_gets_the_user_s_arguments_and_the_real_model_comes_first(monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "run_step", lambda command, output: ran.append(command[3:]) or 0)
    assert bench.run("quality-simulator", ["--texts", "2"]) == 0
    assert ran[0] == ["real_model.make"] and ran[1][-2:] == ["--texts", "2"]


def test_packages_that_cannot_be_had_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/absent.txt").write_text("absent @ file:///nowhere/absent-1.0-py3-none-any.whl\n")
    with pytest.raises(environments.NotMade, match=r"no packages of requirements/absent.txt: .*nowhere"):
        environments.programs("absent")
