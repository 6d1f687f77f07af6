"""`momentkv states` against real servers: save, restart, load; the tokens of a server that read everything."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from engine import random_words
from server import Server
from tiny_models import make_llama

from momentkv_vllm.environment import METRICS_DIR

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY = "a-secret"
EVICT = [
    "--kv-eviction",
    "momentkv",
    "--kv-budget",
    "256",
    "--dtype",
    "float32",
    "--kv-eviction-config.store_dtype",
    "model",
]
POOL = ["--num-gpu-blocks-override", "200", "--max-num-batched-tokens", "256", "--max-model-len", "3000"]
USAGE = ["--enable-prompt-tokens-details", "--api-key", KEY]
PLUGINS = {"VLLM_PLUGINS": "momentkv,momentkv_endpoint"}


DOCUMENT, SYSTEM, QUESTION = random_words(900, 3), random_words(700, 4), random_words(30, 5)


def states(server: Server, *args: object, key: str = KEY) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "momentkv"), "states", *map(str, args), "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_API_KEY": key})


def answers(server: Server) -> list[tuple[str, int]]:
    """A completion and a chat: text and cached tokens."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    more = {"model": "tiny", "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(prompt=f"{DOCUMENT} {QUESTION}", **more)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(messages=messages, **more)
    return [
        (said, usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0)
        for said, usage in ((text.choices[0].text, text.usage), (chat.choices[0].message.content, chat.usage))
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "states").mkdir()
    (tmp_path / "document.txt").write_text(DOCUMENT)
    (tmp_path / "system.txt").write_text(SYSTEM)
    return tmp_path


def test_a_restart_keeps_documents_and_system_prompts(folder, monkeypatch):
    monkeypatch.delenv(METRICS_DIR.name, raising=False)
    model, keep = make_llama(folder / "model", seed=1), ["--kv-eviction-config.state_folder", str(folder / "states")]
    first = Server(model, *EVICT, *POOL, *USAGE, *keep, folder=folder, environment=PLUGINS).wait_ready()
    try:
        for kind, name in (("--text", "document"), ("--system", "system")):
            done = states(first, "save", name, kind, folder / f"{name}.txt")
            assert done.returncode == 0, done.stderr
        want = answers(first)
        refused_without_a_key(first, folder)
        assert not folder.joinpath("outside.safetensors").exists()
        assert "is no name of a state" in states(first, "save", "../outside", "--text", folder / "document.txt").stderr
    finally:
        first.stop()

    second = Server(model, *EVICT, *POOL, *USAGE, *keep, folder=folder, environment=PLUGINS).wait_ready()
    try:
        listed = [json.loads(line) for line in states(second, "list").stdout.splitlines()]
        assert [(s["name"], s["tokens"], s["model_name"]) for s in listed] == [
            ("document", 896, "tiny"),
            ("system", 688, "tiny"),
        ]
        done = states(second, "load")
        assert [json.loads(line)["name"] for line in done.stdout.splitlines()] == ["document", "system"], done.stderr
        got = answers(second)
        assert [text for text, _ in got] == [text for text, _ in want]
        assert [cached for _, cached in got] == [896, 688]
        missing = states(second, "load", "nothing")
        assert missing.returncode == 2 and "there is no state file nothing.safetensors" in missing.stderr
    finally:
        second.stop()

    plain = Server(model, *EVICT, *POOL, *USAGE, "--no-enable-prefix-caching", folder=folder, environment=PLUGINS)
    try:
        plain.wait_ready()
        assert [text for text, _ in answers(plain)] == [text for text, _ in want]
        assert "serve with --kv-eviction-config.state_folder" in states(plain, "list").stderr
    finally:
        plain.stop()


def refused_without_a_key(server: Server, folder: Path) -> None:
    for key in ("", "another"):
        done = states(server, "save", "other", "--text", folder / "document.txt", key=key)
        assert done.returncode == 2 and "Unauthorized" in done.stderr
    for path, body in (("", None), ("/save", b'{"name": "other", "prompt": "w1"}'), ("/load", b'{"name": "document"}')):
        with pytest.raises(urllib.error.HTTPError) as error:
            given = urllib.request.Request(
                f"{server.url}/kv_eviction/states{path}", body, {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(given, timeout=30)
        assert error.value.code == 401
    assert not (folder / "states/other.safetensors").exists()
