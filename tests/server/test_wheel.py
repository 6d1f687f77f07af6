"""The wheel of `make setup` and the guide's policy (docs/policies.md) as installed packages, beside vLLM where there is neither this
checkout nor a compiler.

What the server answers is compared with the simulator, which plays the guide's class on the same tokens.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import vllm
from engine import random_prompt
from named_files import ROOT
from research.simulate import Eviction, SimulatedModel
from server import Server
from tiny_models import make_llama
from vatp_guide import PACKAGE, run_the_guide

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import METRICS_DIR
from momentkv_vllm.page_schedule import build_schedule
from momentkv_vllm.policies import find

WHEELS = sorted((ROOT / "build/wheel").glob("*.whl"))
SCRIPT = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
BUDGET, PAGE = 256, 16
OPTIONS = [
    *("--kv-eviction", "vatp", "--kv-budget", str(BUDGET), "--kv-eviction-config.store_dtype", "model", "--dtype", "float32"),
    *("--num-gpu-blocks-override", "81", "--max-num-batched-tokens", "256", "--max-model-len", "6000"),
    *("--block-size", str(PAGE), "--enable-prompt-tokens-details"),
]  # fmt: skip

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not WHEELS, reason="no wheel in build/wheel: `make setup` builds it"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the packages of this one, linked, but for ours, which comes from the wheel, and the guide's beside
    it. Nothing comes from the network."""
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
    # pip builds in the source tree.
    source = shutil.copytree(PACKAGE, folder / "source")
    pip = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", WHEELS[0], source], check=True, cwd=folder)
    return folder


def variables(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'venv/bin'}:{folder / 'tools'}", "CC": "/bin/false", "CXX": "/bin/false"}


def test_doctor_finds_nothing_wrong_and_names_the_policy_s_package(environment):
    command = [environment / "venv/bin/momentkv", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=environment, env=os.environ | variables(environment), check=True
    )
    report = json.loads(done.stdout)
    assert report["problems"] == [] and report["kernel_families"]["cpu"] == []
    assert report["policies"]["vatp"]["from"] == "momentkv-policy-vatp 0.1.0"
    assert report["policies"]["momentkv"]["from"].startswith("momentkv-vllm ")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("model") / "model", seed=1)


@pytest.fixture(scope="module")
def server(environment, model, tmp_path_factory):
    """From a folder of its own. vLLM compiles what ranks log-probabilities, in stock too, and ends where it finds no compiler."""
    folder = tmp_path_factory.mktemp("server")
    more = {METRICS_DIR.name: str(folder), "TORCHDYNAMO_DISABLE": "1"}
    running = Server(
        model, *OPTIONS, folder=folder, environment=variables(environment) | more,
        executable=environment / "venv/bin/vllm",
    )  # fmt: skip
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def ask(server: Server, prompt: list[int], tokens: int) -> tuple[list[int], list[float], int]:
    """(tokens of the answer, their log-probabilities, prompt tokens that came from the prefix cache)"""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
    body |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    choice, details = answer["choices"][0], answer["usage"]["prompt_tokens_details"] or {}
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], details.get("cached_tokens") or 0


def simulated(model: Path, prompt: list[int], said: list[int], policy) -> torch.Tensor:
    """Log-probabilities of the answer when `policy` decides what stays; None: everything."""
    how = None
    if policy is not None:
        settings = {"correction": "off", "observation_tokens": 16}
        schedule = build_schedule(EvictionConfig(budget_tokens=BUDGET, **settings), PAGE, 0, False)
        how = Eviction(policy(), schedule, observation_tokens=16)
    ids = torch.tensor([prompt + said])
    found = SimulatedModel(model).log_probs(ids, slice(len(prompt) - 1, len(prompt) + len(said) - 1), how)
    return found.gather(-1, ids[:, len(prompt) :, None]).flatten()


SHARED = random_prompt(400, 3)
PROMPTS = {
    "decode past the budget": (random_prompt(60), 400),
    "long prefill": (random_prompt(3000, 1), 24),
    "a prompt that others will share": (SHARED + random_prompt(300, 4)[1:], 24),
    "beside prefix caching": (SHARED + random_prompt(280, 5)[1:], 24),
}


def test_the_server_evicts_what_the_package_s_score_says(server, model):
    """With the C++ kernels of the wheel."""
    assert "kernels cpu (" in server.log and str(ROOT) not in server.log
    (line,) = [x for x in server.log.splitlines() if "momentkv: policy" in x]
    assert "policy vatp (momentkv-policy-vatp 0.1.0), budget 256 tokens = 16 pages of 16" in line
    vatp, cached = run_the_guide()["VATP"], {}
    for name, (prompt, tokens) in PROMPTS.items():
        before = server.metrics()["momentkv:retired_pages_total"]
        said, log_probs, cached[name] = ask(server, prompt, tokens)
        assert server.metrics()["momentkv:retired_pages_total"] - before > 10, name
        mine = torch.tensor(log_probs)
        assert (mine - simulated(model, prompt, said, vatp)).abs().max() < 2e-3, name
        for other in (None, find("snapkv")):
            assert (mine - simulated(model, prompt, said, other)).abs().max() > 0.02, f"{name}: the score must matter"
    # Up to the first event less the 16 queries that the policy observes.
    assert list(cached.values()) == [0, 0, 0, BUDGET - 16]
    assert server.metrics()["momentkv:live_pages"] == 0
