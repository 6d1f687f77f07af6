"""The wheel of `make setup`, installed beside vLLM where there is neither this checkout nor a compiler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import vllm
from engine import random_prompt
from named_files import ROOT
from server import Server
from tiny_models import make_llama

WHEELS = sorted((ROOT / "build/wheel").glob("*.whl"))
SCRIPT = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not WHEELS, reason="no wheel in build/wheel: `make setup` builds it"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the packages of this one, linked, but for ours, which comes from the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    theirs = folder / "theirs"
    theirs.mkdir()
    for package in Path(vllm.__file__).parents[1].iterdir():
        if "momentkv" not in package.name and package.suffix != ".pth":
            (theirs / package.name).symlink_to(package)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "theirs.pth").write_text(f"{theirs}\n")
    script = folder / "venv/bin/vllm"
    script.write_text(SCRIPT.format(python=python))
    script.chmod(0o755)
    # vLLM asks lscpu for the cores; a compiler is not to be found.
    (folder / "tools").mkdir()
    (folder / "tools/lscpu").symlink_to(shutil.which("lscpu"))
    pip = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, WHEELS[0]], check=True, cwd=folder)
    return folder


def variables(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'venv/bin'}:{folder / 'tools'}", "CC": "/bin/false", "CXX": "/bin/false"}


def test_doctor_finds_nothing_wrong(environment):
    command = [environment / "venv/bin/momentkv", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=environment, env=os.environ | variables(environment), check=True
    )
    report = json.loads(done.stdout)
    assert report["problems"] == [] and report["kernel_families"]["cpu"] == []


def test_it_is_served_from_any_folder(environment, tmp_path):
    """With the C++ kernels of the wheel."""
    options = ["--kv-eviction", "momentkv", "--kv-budget", "256", "--max-model-len", "2048", "--block-size", "16"]
    running = Server(
        make_llama(tmp_path / "model"), *options, folder=tmp_path, environment=variables(environment),
        executable=environment / "venv/bin/vllm",
    )  # fmt: skip
    try:
        running.wait_ready()
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt=random_prompt(1500), max_tokens=8)
        assert answer.usage.completion_tokens
        assert running.metrics()["momentkv:retired_pages_total"] > 0
        assert "kernels cpu (" in running.log and str(ROOT) not in running.log
    finally:
        running.stop()
