"""The guide's policy (docs/policies.md): its code keeps the contract, and as an installed package it is served over HTTP.

What the server answers is compared with the simulator, which plays the same class on the same tokens.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
from engine import random_prompt
from research.simulate import Eviction, SimulatedModel
from server import Server
from tiny_models import make_llama

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import METRICS_DIR
from momentkv_vllm.page_schedule import build_schedule
from momentkv_vllm.policies import Policy, find

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples/momentkv-policy-vatp"
GUIDE = (ROOT / "docs/policies.md").read_text()
BUDGET, PAGE = 256, 16
OPTIONS = [
    *(
        "--kv-eviction",
        "vatp",
        "--kv-budget",
        str(BUDGET),
        "--kv-eviction-config.store_dtype",
        "model",
        "--dtype",
        "float32",
        "--enable-prompt-tokens-details",
    ),
    *("--num-gpu-blocks-override", "81", "--max-num-batched-tokens", "256", "--max-model-len", "6000"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)


def run_the_guide() -> dict:
    """Every Python block of the guide, one after the other; the last one calls check_policy."""
    names: dict = {"__name__": "guide"}
    for block in blocks("python"):
        exec(compile(block, "docs/policies.md", "exec"), names)
    return names


def test_the_guide_is_the_example_and_keeps_the_contract():
    code = blocks("python")[0]
    assert code == (PACKAGE / "momentkv_policy_vatp.py").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    assert "check_policy(VATP)" in blocks("python")[-1]
    assert run_the_guide()["VATP"].name == "vatp"
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (entry,) = blocks("toml")
    assert tomllib.loads(entry)["project"]["entry-points"] == project["entry-points"]
    assert f"{project['name']} {project['version']}" in GUIDE
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) == 3


def test_the_guide_has_every_declaration_with_its_default():
    body = GUIDE.split("| attribute | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
    said = {}
    for line in body.splitlines():
        attributes, default, _ = line.strip("| ").split(" | ", 2)
        said |= {name: default for name in re.findall(r"`(\w+)`", attributes)}
    absent = object()
    real = {name: getattr(Policy, name, absent) for name in Policy.__annotations__}
    shown = {"-": absent, '`""`': "", "`()`": (), "`{}`": {}, "`None`": None, "`False`": False}
    assert {name: shown[default] for name, default in said.items()} == real


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package as pip installs it, with nothing from the network."""
    folder = tmp_path_factory.mktemp("vatp")
    # pip builds in the source tree.
    source = shutil.copytree(PACKAGE, folder / "source")
    pip = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", source], check=True, cwd=folder)
    return folder / "site"


def test_doctor_names_the_installed_package(site):
    command = [Path(sys.executable).parent / "momentkv", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=site, env=os.environ | {"PYTHONPATH": str(site)})
    assert re.search(r"^  vatp +momentkv-policy-vatp 0\.1\.0$", said.stdout, re.M), said.stdout + said.stderr
    assert re.search(r"^  momentkv +momentkv-vllm ", said.stdout, re.M)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("model") / "model", seed=1)


@pytest.fixture(scope="module")
def server(site, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    environment = {"PYTHONPATH": str(site), METRICS_DIR.name: str(folder)}
    running = Server(model, *OPTIONS, folder=folder, environment=environment)
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


@pytest.mark.server
@pytest.mark.timeout(900)
def test_the_server_evicts_what_the_package_s_score_says(server, model):
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
