"""The MOMENTKV_ variables: one typed place, documented, and none beside it."""

import ast
import logging
import re
from pathlib import Path

import pytest
from vllm import EngineArgs

from momentkv_vllm.environment import ALLOW_UNTESTED_VLLM, METRICS_DIR, VARIABLES, unknown_variables

ROOT = Path(__file__).parents[2]


def test_the_guide_lists_them():
    want = [f"| `{v.name}` | {v.values} | {v.default or '-'} | {v.readers} | {v.meaning} |" for v in VARIABLES]
    text = (ROOT / "docs/operations.md").read_text()
    assert (
        text.split("| variable | values | default | read by | meaning |\n|---|---|---|---|---|\n")[1]
        .split("\n\n")[0]
        .split("\n")
        == want
    )


def test_no_other_variable_is_named_anywhere():
    """In C++ what is asked of the environment (other words there are macros), else every word that begins like one."""
    folders = (
        "momentkv_vllm",
        "csrc",
        "triton_kernels",
        "benchmarks",
        "tests",
        "docs",
        "docker",
        "requirements",
        ".ci",
    )
    paths = [*ROOT.iterdir(), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    words = {suffix: r'getenv\("(MOMENTKV_\w+)' for suffix in (".cpp", ".cu", ".cuh", ".h")}
    words |= {suffix: r"\b(MOMENTKV_[A-Z_]*[A-Z])\b" for suffix in (".py", ".md", ".yaml", ".yml", ".sh", "")}
    known, read = {v.name for v in VARIABLES}, set()
    for path in paths:
        if path.suffix in words and path.is_file() and path != Path(__file__):
            found = set(re.findall(words[path.suffix], path.read_text(errors="ignore")))
            assert found <= known, f"{path.relative_to(ROOT)}: {found - known}"
            read |= found
    assert read == known


def test_the_package_reads_them_in_one_place():
    for path in (ROOT / "momentkv_vllm").rglob("*.py"):
        if path.name != "environment.py":
            words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not words & {v.name for v in VARIABLES}, f"{path.name} names a variable of environment.py itself"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_switches(monkeypatch, value, on):
    monkeypatch.delenv(ALLOW_UNTESTED_VLLM.name, raising=False)
    if value is not None:
        monkeypatch.setenv(ALLOW_UNTESTED_VLLM.name, value)
    assert ALLOW_UNTESTED_VLLM.is_on() is on


def test_a_switch_that_is_neither(monkeypatch):
    monkeypatch.setenv(ALLOW_UNTESTED_VLLM.name, "true")
    with pytest.raises(ValueError, match="MOMENTKV_ALLOW_UNTESTED_VLLM='true' is not 0 or 1"):
        ALLOW_UNTESTED_VLLM.is_on()


def test_a_typing_mistake_is_said_at_start_up(models, monkeypatch, caplog):
    for name in (
        "MOMENTKV_METRIC_DIR",
        "MOMENTKV_PORT",
        "MOMENTKV_SERVICE_HOST",
        "MOMENTKV_PORT_8000_TCP_ADDR",
        "MOMENTKV_CPU_ISA",
    ):
        monkeypatch.setenv(name, "")
    assert unknown_variables() == ["MOMENTKV_METRIC_DIR"] and METRICS_DIR.name == "MOMENTKV_METRICS_DIR"
    said = []
    monkeypatch.setattr(
        logging.getLogger("vllm.momentkv_vllm.vllm_seams.engine_args"), "warning", lambda *a: said.append(a[0] % a[1:])
    )
    evict = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256}}
    EngineArgs(model=str(models()), max_model_len=2048, additional_config=evict).create_engine_config()
    assert any("MOMENTKV_METRIC_DIR" in line for line in said)


def test_every_logger_is_below_vllm_s():
    """vLLM gives handlers to its own loggers alone: INFO lines of others are lost."""
    for path in (ROOT / "momentkv_vllm").rglob("*.py"):
        for name in re.findall(r"(?:getLogger|init_logger)\((.*)\)", path.read_text()):
            assert name == 'f"vllm.{__name__}"', f"{path.relative_to(ROOT)}: {name}"
