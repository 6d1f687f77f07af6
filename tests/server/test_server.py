"""A real `vllm serve --kv-eviction`, asked through the openai client, and what a request must not be able to do."""

import concurrent.futures
import itertools
import json
import time
import urllib.error
import urllib.request

import openai
import pytest
from engine import attends_prompts, random_words
from evicting_server import KEY
from server import Server

from momentkv_vllm.kernels.cpu import Cpu

pytestmark = [pytest.mark.timeout(600)]


@pytest.fixture
def server(evicting_server):
    return evicting_server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


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


def post(server, body: dict, headers: dict | None = None, key: str | None = KEY) -> dict:
    """JSON of /v1/completions. Raises urllib.error.HTTPError."""
    given = {"Content-Type": "application/json", **(headers or {})}
    if key:
        given["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps({"model": "tiny", **body}).encode(), given
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_long_prompts_are_answered_and_counted(server, client):
    """Prompts of 1,500 to 5,000 tokens, several at once, in a pool of 1,280."""
    prompts = [random_words(n) for n in (5000, 1500, 2500, 40)]
    before = server.metrics()

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, logprobs=2)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, prompts))
    assert [a.usage.completion_tokens for a in answers] == [24] * 4
    assert [len(a.choices[0].logprobs.tokens) for a in answers] == [24] * 4
    after = server.metrics()
    assert after["momentkv:retired_pages_total"] - before["momentkv:retired_pages_total"] > 400
    assert after["momentkv:evicted_tokens_total"] > before["momentkv:evicted_tokens_total"]
    assert after["momentkv:live_pages"] == after["momentkv:sequences"] == after["momentkv:stock_pages"] == 0


def test_chat_streams(client):
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": random_words(700)}], max_tokens=12, temperature=0, stream=True,
        logprobs=True, top_logprobs=2, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices and c.choices[0].logprobs) == 12
    assert chunks[-1].usage.completion_tokens == 12


def test_chat_and_completion_agree(client):
    prompt = random_words(600)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=10, temperature=0
    )
    text = client.completions.create(model="tiny", prompt="<s> " + prompt, max_tokens=10, temperature=0)
    assert chat.choices[0].message.content.split() == text.choices[0].text.split()


def test_two_choices(client):
    answer = client.completions.create(model="tiny", prompt=random_words(500), max_tokens=6, n=2, temperature=0.9)
    assert len(answer.choices) == 2


def test_disconnect_mid_stream_returns_the_pages(server, client):
    """Long before the answer would have ended. When the server notices is its own affair: where other work has the cores, the
    answer may be there before its first token is sent, and another one is asked for."""

    def figure(name):
        return server.metrics("vllm:")[f"vllm:{name}"]

    def said_to_nobody(length):
        """Tokens of an answer of `length` of which the first one is read."""
        before = figure("generation_tokens_total")
        stream = client.completions.create(
            model="tiny", prompt=random_words(900), max_tokens=length, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        end = time.monotonic() + 60
        while figure("num_requests_running") and time.monotonic() < end:
            time.sleep(0.1)
        return figure("generation_tokens_total") - before

    assert any(said_to_nobody(5000) < 2500 for _ in range(6))
    client.completions.create(model="tiny", prompt=random_words(20), max_tokens=50)
    assert server.metrics()["momentkv:live_pages"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "w1", "max_tokens": -1},
        {"prompt": "w1", "temperature": -3},
        {"prompt": "w1", "n": 0},
        {"prompt": [1, 2, 99999]},
        {"prompt": "w1 " * 7000},
        {"prompt": "w1", "max_tokens": "many"},
        {},
        {"prompt": "w1", "n": 100_000},
        {"prompt": "w1", "logprobs": 1000},
        {"prompt": "w1", "prompt_logprobs": 1000},
        {"prompt": "w1", "max_tokens": 10**9},
        {"prompt": [[1, 2]] * 3 + [[10**7]]},
        # A tensor that vLLM would unpickle: refused unless the operator enables it.
        {"prompt_embeds": "gASVAAAAAAAAAAAu"},
    ],
    ids=lambda body: "-".join(body),
)
def test_malformed_requests_get_4xx_and_disturb_nobody(server, client, body):
    prompt = random_words(800, seed=7)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        good = pool.submit(client.completions.create, model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        with pytest.raises(urllib.error.HTTPError) as error:
            post(server, body)
        assert 400 <= error.value.code < 500
        assert json.loads(error.value.read())["error"]["message"]
        first = good.result().choices[0].text
    again = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
    assert again.choices[0].text == first


def test_without_the_key_nothing_is_answered(server):
    for key in (None, "another"):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(server, {"prompt": "w1"}, key=key)
        assert error.value.code == 401


def test_requests_cannot_change_the_eviction(server, engine, hidden_model, monkeypatch):
    """The same tokens and the same evicted tokens with every attempt; another policy would give both otherwise."""
    prompt, salts = random_words(900), itertools.count()

    def answer(more, headers=None):
        """From the beginning, no state of an earlier answer."""
        asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        said = post(server, {**asked, "cache_salt": f"salt {next(salts)}", **more}, headers)
        return said["choices"][0]["token_ids"]

    want, evicted = answer({}), []
    for number, more in enumerate([{}, *FLAGS.values()]):
        before = server.metrics()["momentkv:evicted_tokens_total"]
        assert answer(more, HEADERS if number else None) == want, more
        evicted.append(server.metrics()["momentkv:evicted_tokens_total"] - before)
    assert evicted[0] > 0 and set(evicted) == {evicted[0]}
    for other in (128, "off"):  # the one class of this server is named 256
        with pytest.raises(urllib.error.HTTPError) as error:
            answer({"vllm_xargs": {"kv_budget": other}})
        assert error.value.code == 400 and "is not one of 256" in json.loads(error.value.read())["error"]["message"]
    same = {"model": hidden_model, "dtype": "bfloat16", "enable_prefix_caching": True}
    monkeypatch.setattr(Cpu, "attends_prompts", attends_prompts)  # as the server does, on AMX
    other = engine(**OTHER, **same)
    ours = engine(
        policy="momentkv", budget_tokens=256, window_tokens=48, store_dtype="auto", key_rounding="auto", **same
    )
    ids = other.vllm.get_tokenizer().encode(prompt)
    assert ours.generate([ids], 24) == [want] != other.generate([ids], 24)


def test_start_up_line_states_the_layout(server):
    (line,) = [x for x in server.log.splitlines() if "momentkv: policy" in x]
    for part in (
        "policy momentkv",
        "budget 256 tokens = 16 pages of 16",
        "(store 12, moments 0, window 4), state 1152 bytes a sequence and layer (2 % of the budget)",
        "pool 80 pages",
        "about 5 sequences",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("options", "words_in_log"),
    [
        # The same words without a server: tests/engine/test_prefix_cache.py and tests/unit/test_config.py.
        pytest.param(
            ["--kv-eviction", "h2o", "--enable-prefix-caching"],
            ["--enable-prefix-caching", "serve without --kv-eviction"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--kv-eviction", "lru"], ["--kv-eviction", "lru", "momentkv"], marks=pytest.mark.slow),
        pytest.param(["--kv-budget", "64"], ["without 'policy'", "--kv-eviction"], marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cannot_evict_does_not_start(hidden_model, tmp_path, options, words_in_log):
    failing = Server(hidden_model, *options, folder=tmp_path)
    assert failing.process.wait(400) != 0
    for word in words_in_log:
        assert word in failing.log
