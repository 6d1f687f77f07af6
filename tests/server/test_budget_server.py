"""A real server with several budgets: what a request chooses over HTTP, and what its response says of it."""

import concurrent.futures
import json
from itertools import product

import openai
import pytest
from engine import random_words
from quick import quick
from server import Server
from tiny_models import make_llama

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

OPTIONS = [
    "--kv-eviction", "momentkv", "--kv-budget", "small=256,large=512,exact=off", "--dtype", "float32",
    "--kv-eviction-config.store_dtype", "model", "--num-gpu-blocks-override", "300", "--max-num-batched-tokens", "256",
    "--max-model-len", "3000",
]  # fmt: skip
PROMPT, NEW = random_words(1500, seed=3), 24
MESSAGES = [{"role": "user", "content": random_words(1200, seed=4)}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    running = Server(make_llama(folder / "model", seed=1), *OPTIONS, folder=folder).wait_ready()
    yield running
    running.stop()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client, more: dict, prompt=PROMPT, **options):
    body = {"vllm_xargs": more, "ignore_eos": True}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, extra_body=body, **options
    )


def chat(client, more: dict, **options):
    body = {"vllm_xargs": more, "ignore_eos": True}
    return client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=NEW, temperature=0, extra_body=body, **options
    )


def said(answer) -> dict:
    return answer.usage.model_extra.get("kv_eviction")


def last_usage(stream):
    """(text, usage block) of a stream."""
    text, usage = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None) or ""
        usage = chunk.usage or usage
    return text, usage


def test_requests_at_a_time_choose_and_are_told(server, client):
    """All classes at once; pages are those of the class, tokens add up, and the default is the first."""
    names = ["small", "large", "exact", None]

    def ask(name):
        return complete(client, {"kv_eviction_usage": True} | ({"kv_budget": name} if name else {}))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = dict(zip(names, pool.map(ask, names), strict=True))
    assert answers[None].choices[0].text == answers["small"].choices[0].text
    assert len({answers[name].choices[0].text for name in names[:3]}) == 3
    for name, answer in answers.items():
        told = said(answer)
        assert told["kv_budget"] == (name or "small")
        assert told["held_tokens"] + told["evicted_tokens"] == answer.usage.total_tokens - 1
        assert (
            "kv_transfer_params" not in (answer.model_extra or {}) or answer.model_extra["kv_transfer_params"] is None
        )
    held = {name: said(answers[name])["held_pages"] for name in names[:3]}
    assert held["small"] <= 16 and 16 < held["large"] <= 32 and held["exact"] == (1500 + NEW - 1) // 16 + 1
    assert said(answers["exact"])["evicted_tokens"] == 0 < said(answers["large"])["evicted_tokens"]


@pytest.mark.parametrize("ask", [complete, chat])
def test_streams_say_it_in_the_last_chunk(client, ask):
    chosen = {"kv_budget": "large", "kv_eviction_usage": True}
    whole = ask(client, chosen)
    text, usage = last_usage(ask(client, chosen, stream=True, stream_options={"include_usage": True}))
    plain = whole.choices[0].text if ask is complete else whole.choices[0].message.content
    assert text == plain and usage.model_extra["kv_eviction"] == said(whole)
    assert usage.total_tokens == whole.usage.total_tokens
    assert said(whole)["evicted_tokens"] > 500
    # Without the usage block, or without having asked, nothing is added.
    assert last_usage(ask(client, chosen, stream=True))[1] is None
    quiet = ask(client, {"kv_budget": "large"}, stream=True, stream_options={"include_usage": True})
    assert "kv_eviction" not in (last_usage(quiet)[1].model_extra or {})
    assert said(ask(client, {"kv_budget": "large"})) is None


def test_several_prompts_are_summed(client):
    chosen = {"kv_budget": "small", "kv_eviction_usage": True}
    one, other = (said(complete(client, chosen, prompt=p)) for p in (PROMPT, MESSAGES[0]["content"]))
    both = complete(client, chosen, prompt=[PROMPT, MESSAGES[0]["content"]])
    assert said(both) == {k: v if isinstance(v, str) else v + other[k] for k, v in one.items()}


WRONG = {
    "medium": ({"kv_budget": "medium"}, "kv_budget='medium' is not one of small, large, exact"),
    "256": ({"kv_budget": 256}, "kv_budget='256' is not one of small, large, exact"),
    "list": ({"kv_budget": ["small"]}, "is not one of small, large, exact"),
    "usage": ({"kv_eviction_usage": "yes"}, "is not true or false"),
}
WAYS = list(product(WRONG, (complete, chat), (False, True)))


# One check reads them all: each wrong value in one way, one of them in every way.
@pytest.mark.parametrize(
    ("wrong", "ask", "stream"), quick([w for w in WAYS if w[0] == "medium" or w[1:] == (chat, True)], WAYS)
)
def test_a_wrong_choice_gets_400_and_disturbs_nobody(client, wrong, ask, stream):
    more, words = WRONG[wrong]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        good = pool.submit(complete, client, {"kv_budget": "large"})
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, more, stream=stream)
        assert error.value.status_code == 400 and words in json.dumps(error.value.body)
        first = good.result().choices[0].text
    assert complete(client, {"kv_budget": "large"}).choices[0].text == first


def test_metrics_and_log_by_class(server, client):
    complete(client, {"kv_budget": "large"})
    samples = [line for line in server.samples() if line.startswith("momentkv:class_")]
    found = {(s.split("{")[0], s.split('kv_budget="')[1].split('"')[0]): float(s.rsplit(" ", 1)[1]) for s in samples}
    budgets = [found["momentkv:class_budget_pages", name] for name in ("small", "large", "exact")]
    assert budgets == [16, 32, 3000 // 16 + 1]
    evicted = [found["momentkv:class_evicted_tokens_total", name] for name in ("small", "large", "exact")]
    assert evicted[2] == 0 < evicted[1] and sum(evicted) == server.metrics()["momentkv:evicted_tokens_total"]
    assert server.metrics()["momentkv:budget_pages"] == 16, "without the label it is the default class's"
    for words in ("budget 256 tokens", "budget 512 tokens", "kv_budget exact keep all of up to 3000 tokens"):
        assert words in server.log
    assert (
        "a request chooses by vllm_xargs {'kv_budget': name} of small, large, exact; small is the default" in server.log
    )
