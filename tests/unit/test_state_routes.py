"""The routes of states without an engine: who may ask, and what is asked of the engine."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from momentkv_vllm.endpoint import KVEvictionEndpoint, summary

KEY = {"Authorization": "Bearer secret"}


class Core:
    """Records what it is asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    async def call_utility_all_async(self, *args):
        self.asked.append(args)
        return self.answers


class Tokenizer:
    """A word is its length; a chat is its messages' words and one of its own at the end."""

    async def create_tokenize(self, asked, request):
        if hasattr(asked, "prompt"):
            text = asked.prompt.split()
        else:
            text = [w for m in asked.messages for w in [m["role"], *m["content"].split()]] + ["end"]
        if "bad" in text:
            return SimpleNamespace(error=SimpleNamespace(message="no such word"))
        return SimpleNamespace(tokens=[100 + len(w) if len(w) > 1 else ord(w) for w in text])


def client(folder, key="secret", answers=({"tokens": 5},)):
    app = FastAPI()
    app.state.args = Namespace(api_key=[key] if key else None)
    carrier = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256, "state_folder": folder}}
    config = SimpleNamespace(additional_config=carrier, parallel_config=SimpleNamespace(data_parallel_size=2))
    read = []

    async def generate(prompt, settings, name, **options):
        read.append((prompt, settings.max_tokens, options))
        yield None

    core = Core(list(answers))
    app.state.momentkv_engine = SimpleNamespace(vllm_config=config, engine_core=core, generate=generate)
    app.state.serving_tokenization = Tokenizer()
    KVEvictionEndpoint().attach_router(app)
    return TestClient(app), core, read


def test_without_a_folder_or_a_key_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for folder, key, words in ((None, "secret", "state_folder"), (str(tmp_path), None, "--api-key")):
        asks, core, read = client(folder, key)
        for answer in (
            asks.get("/kv_eviction/states", headers=KEY),
            asks.post("/kv_eviction/states/save", json={"name": "a", "prompt": "x y"}, headers=KEY),
            asks.post("/kv_eviction/states/load", json={"name": "a"}, headers=KEY),
        ):
            assert answer.status_code in (400, 403) and words in answer.json()["error"]
        assert not core.asked and not read


def test_a_text_is_read_by_the_first_engine_and_saved(tmp_path):
    asks, core, read = client(str(tmp_path), answers=({"tokens": 5}, {}))
    answer = asks.post(
        "/kv_eviction/states/save", json={"name": "a", "prompt": "x y z", "cache_salt": "s"}, headers=KEY
    )
    assert answer.json() == {"tokens": 5}
    tokens = [ord("x"), ord("y")]
    assert read == [({"prompt_token_ids": tokens, "cache_salt": "s"}, 1, {"data_parallel_rank": 0})]
    assert core.asked == [("kv_eviction_states", "save", "a", tokens, "s", "")]


@pytest.mark.parametrize(("role", "next_role"), [("system", "user"), ("assistant", "user"), ("user", "assistant")])
def test_messages_are_read_up_to_where_continuations_part(tmp_path, role, next_role):
    asks, core, _ = client(str(tmp_path))
    messages = [{"role": role, "content": "you are"}]
    assert asks.post("/kv_eviction/states/save", json={"name": "a", "messages": messages}, headers=KEY).is_success
    assert core.asked[0][3] == [100 + len(role), 103, 103, 100 + len(next_role)]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "a"}, 400, "a prompt or of messages"),
        ({"name": "a", "prompt": "x", "messages": []}, 400, "a prompt or of messages"),
        ({"name": "a", "prompt": "bad"}, 400, "no such word"),
        ({"prompt": "x"}, 422, "name"),
        ({"name": "a", "prompt": "x", "folder": "/tmp"}, 422, "folder"),
    ],
)
def test_what_cannot_be_saved(tmp_path, body, status, words):
    asks, core, _ = client(str(tmp_path))
    answer = asks.post("/kv_eviction/states/save", json=body, headers=KEY)
    assert answer.status_code == status and words in answer.text and not core.asked


def test_one_engines_refusal_is_the_answer(tmp_path):
    asks, _, _ = client(str(tmp_path), answers=({"tokens": 5}, {"error": "no room"}))
    answer = asks.post("/kv_eviction/states/load", json={"name": "a"}, headers=KEY)
    assert answer.status_code == 400 and answer.json() == {"error": "no room"}


def test_the_folder_is_not_told(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    asks, _, _ = client(str(tmp_path))
    listed = asks.get("/kv_eviction/states", headers=KEY)
    assert [state["name"] for state in listed.json()["states"]] == ["a"] and str(tmp_path) not in json.dumps(
        listed.json()
    )


def test_the_endpoint_beside_it_says_only_that_there_is_one(tmp_path):
    for folder, said in ((str(tmp_path), "set"), (None, None)):
        carrier = {"kv_eviction": {"policy": "off", "state_folder": folder}}
        assert summary(SimpleNamespace(additional_config=carrier))["config"]["state_folder"] == said
