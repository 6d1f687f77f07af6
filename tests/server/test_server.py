"""A real `vllm serve --kv-eviction`, asked through the openai client."""

import concurrent.futures
import json
import urllib.request

import openai
import pytest
from engine import random_words
from server import Server
from tiny_models import make_llama

from momentkv_vllm.environment import METRICS_DIR

pytestmark = [pytest.mark.timeout(600)]

POOL = ["--num-gpu-blocks-override", "81", "--max-num-batched-tokens", "256", "--max-model-len", "6000"]
OPTIONS = ["--kv-eviction", "momentkv", "--kv-budget", "256", "--kv-eviction-config.window_tokens", "48", *POOL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    with pytest.MonkeyPatch.context() as environment:
        # A server started from another vLLM process inherits that one's metrics directory, and must not use it.
        environment.setenv(METRICS_DIR.name, str(folder))
        running = Server(make_llama(folder / "model"), *OPTIONS, folder=folder).wait_ready()
    yield running
    running.stop()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


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
    stream = client.completions.create(
        model="tiny", prompt=random_words(900), max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
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
    ],
)
def test_malformed_requests_get_4xx_and_disturb_nobody(server, client, body):
    prompt = random_words(800, seed=7)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        good = pool.submit(client.completions.create, model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps({"model": "tiny", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=60)
        assert 400 <= error.value.code < 500
        assert json.loads(error.value.read())["error"]["message"]
        first = good.result().choices[0].text
    again = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
    assert again.choices[0].text == first


def test_start_up_line_states_the_layout(server):
    (line,) = [x for x in server.log.splitlines() if "momentkv: policy" in x]
    for part in (
        "policy momentkv",
        "budget 256 tokens = 16 pages of 16",
        "(store 12, moments 0, window 4), state 640 bytes a sequence and layer (1 % of the budget)",
        "pool 80 pages",
        "about 5 sequences",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("options", "words_in_log"),
    [
        (
            ["--kv-eviction", "h2o", "--enable-prefix-caching"],
            ["--enable-prefix-caching", "serve without --kv-eviction"],
        ),
        # The same words without a server: tests/unit/test_config.py.
        pytest.param(["--kv-eviction", "lru"], ["--kv-eviction", "lru", "momentkv"], marks=pytest.mark.slow),
        pytest.param(["--kv-budget", "64"], ["without 'policy'", "--kv-eviction"], marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cannot_evict_does_not_start(folder, options, words_in_log):
    failing = Server(make_llama(folder / "model"), *options, folder=folder)
    assert failing.process.wait(120) != 0
    for word in words_in_log:
        assert word in failing.log
