"""A real Prometheus scrapes a real `vllm serve` with two API servers; every query of the dashboard and the alerts runs on it."""

import concurrent.futures
import json
import math
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from engine import random_prompt, random_words
from evicting_server import KEY
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus import ALERTS, CONFIGURATION, Prometheus, alerts, metric_names, panels

from momentkv_vllm.endpoint import KVEvictionEndpoint
from momentkv_vllm.metrics import METRICS, SEQUENCES

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no program `prometheus` (Debian: apt-get install prometheus)"
)
SECRET = "w77 w78 w79"
UNIT_TESTS = Path(__file__).parents[1] / "data/alerts_test.yml"


@pytest.fixture(scope="module")
def server(evicting_server):
    return evicting_server


@pytest.fixture(scope="module")
def asked(server):
    """The server after four prompts, the longest four times its pool; tokens of their answers."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

    def ask(tokens):
        prompt = f"{SECRET} {random_words(tokens)}"
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        return list(threads.map(ask, [5000, 1500, 2500, 40]))


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    if shutil.which("prometheus") is None:
        pytest.skip("no program `prometheus`")
    running = Prometheus(server.url.removeprefix("http://"), tmp_path_factory.mktemp("scrapes"))
    try:
        yield running.wait_scrapes(2)
    finally:
        running.stop()


def get(server, key: str | None = KEY):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/kv_eviction", headers=headers), timeout=120
    ) as answer:
        return answer.read().decode()


@needs_prometheus
@pytest.mark.server
@pytest.mark.timeout(600)
class TestScraped:
    @pytest.fixture(autouse=True)
    def traffic(self, prometheus, asked):
        prometheus.wait_scrapes(2)

    def test_every_metric_arrives_once_an_engine_with_its_type(self, prometheus):
        types = prometheus.get("metadata")
        for metric in METRICS:
            assert types[metric.shown if metric.shown in types else metric.name][0]["type"] == metric.kind
            name = f"{metric.name}_count" if metric.bounds else metric.shown
            found = prometheus.query(name)
            assert len(found) == max(1, len(metric.label_values)), name
            assert all(x["metric"]["engine"] == "0" and x["metric"]["model_name"] == "tiny" for x in found)

    def test_values_add_up(self, prometheus):
        def value(query):
            (found,) = prometheus.query(query)
            return float(found["value"][1])

        assert value("momentkv:retired_pages_total") > 400
        layers, kv_heads, head_dim, k_and_v, bfloat16 = 2, 2, 32, 2, 2
        page_bytes = 16 * layers * kv_heads * head_dim * k_and_v * bfloat16
        assert value("momentkv:freed_bytes_total") == value("momentkv:retired_pages_total") * page_bytes
        assert value("momentkv:consolidate_seconds_count") > 100 > value("momentkv:consolidate_seconds_sum") > 0
        assert 0 < value("momentkv:evicted_mass_ratio_sum / momentkv:evicted_mass_ratio_count") < 1
        assert value("momentkv:correction_ratio_count") == value("momentkv:evicted_mass_ratio_count") > 3
        assert value("momentkv:pool_pages") == 80 and value("momentkv:budget_pages") == 16

    def test_stock_would_need_more_than_the_pool(self, server, prometheus):
        """A sequence of more tokens than the pool has slots is there until a scrape has seen it."""
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        seen = threading.Event()

        def ask():
            while not seen.is_set():
                client.completions.create(
                    model="tiny",
                    prompt=random_prompt(3000),
                    max_tokens=2500,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            asking = thread.submit(ask)
            try:
                prometheus.wait_value("max_over_time(momentkv:stock_pages[5m])", at_least=81)
            finally:
                seen.set()
            asking.result()

    def test_both_api_servers_say_the_same(self, server):
        """Connections land on either of the two; 20 of them practically on both."""
        quiet = server.samples()
        assert all(server.samples() == quiet for _ in range(20))

    def test_every_query_of_the_dashboard_returns_data(self, prometheus):
        for panel, queries in panels("5m"):
            for legend, query in queries:
                found = prometheus.query(query)
                assert found, f"{panel['title']}: {query}"
                assert all(math.isfinite(float(x["value"][1])) for x in found), f"{panel['title']}: {query}"
                for label in re.findall(r"{{(\w+)}}", legend):
                    assert all(label in x["metric"] for x in found), f"{panel['title']}: no {label} for the legend"

    def test_every_alert_can_be_evaluated_on_data_and_none_fires_wrongly(self, prometheus):
        """An alert's query is empty while all is well, so what it reads is asked for by itself."""
        for name, expression in alerts().items():
            for metric in metric_names(expression):
                assert prometheus.query(metric), f"{name}: no series {metric}"
            prometheus.query(expression)
        groups = prometheus.get("rules")["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        assert rules.keys() == alerts().keys() and {r["health"] for r in rules.values()} == {"ok"}
        assert not [n for n, r in rules.items() if r["state"] == "firing"]


@pytest.mark.server
@pytest.mark.timeout(600)
class TestEndpoint:
    def test_tells_configuration_schedule_totals_health(self, server, asked):
        answer = json.loads(get(server))
        assert answer["active"] and answer["healthy"]
        assert answer["config"]["policy"] == "momentkv" and answer["config"]["budget_tokens"] == 256
        plan = answer["schedule"]
        assert plan["budget_pages"] == 16 == plan["store_pages"] + plan["moment_pages"] + plan["window_pages"]
        assert plan["first_event"] == 256 and plan["page_size"] == 16
        totals = answer["totals"]
        assert totals["momentkv:retired_pages_total"] > 400 and totals["momentkv:consolidate_seconds_count"] > 100
        for state in SEQUENCES.label_values:
            assert totals[f'momentkv:sequences{{state="{state}"}}'] == 0

    @pytest.mark.parametrize("key", [None, "wrong", KEY + "x", ""])
    def test_wants_the_api_key(self, server, key):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(server, key)
        assert error.value.code == 401
        assert json.loads(error.value.read()) == {"error": "Unauthorized"}

    def test_reveals_no_prompt_path_environment_or_key(self, server, asked):
        text = get(server)
        secrets = [
            KEY,
            SECRET,
            *SECRET.split(),
            "hidden-folder",
            "tiny",
            "VLLM",
            "PATH",
            asked[0].id,
            asked[0].choices[0].text.split()[0],
        ]
        for secret in secrets:
            assert secret not in text, secret
        answer = json.loads(text)
        assert answer.keys() == {"active", "config", "schedule", "classes", "healthy", "totals"}
        told = [answer[key] for key in ("config", "schedule", "totals")] + list(answer["classes"].values())
        values = [value for part in told for value in part.values()]
        assert not [v for v in values if isinstance(v, str) and "/" in v]

    def test_other_methods_are_refused(self, server):
        request = urllib.request.Request(f"{server.url}/kv_eviction", b"{}", {"Authorization": f"Bearer {KEY}"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=120)
        assert error.value.code == 405


@pytest.mark.parametrize(("key", "status"), [(None, 503), ("secret", 401)])
def test_a_dead_engine_without_eviction_is_told_without_its_message(monkeypatch, key, status):
    async def dead():
        raise RuntimeError("EngineCore died: /home/somebody/model")

    monkeypatch.setenv("VLLM_API_KEY", key or "")
    app = FastAPI()
    app.state.args = Namespace(api_key=None)
    app.state.momentkv_engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}), check_health=dead)
    KVEvictionEndpoint().attach_router(app)
    answer = TestClient(app).get("/kv_eviction")
    assert answer.status_code == status and "somebody" not in answer.text
    if not key:
        assert answer.json()["healthy"] is answer.json()["active"] is False and "schedule" not in answer.json()


@needs_prometheus
@pytest.mark.parametrize(
    "command", [["check", "config", CONFIGURATION], ["check", "rules", ALERTS], ["test", "rules", UNIT_TESTS]]
)
def test_promtool(command):
    done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_and_an_entry_in_the_troubleshooting_guide():
    guide = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
    tests = UNIT_TESTS.read_text()
    for name in alerts():
        assert f"alertname: {name}\n" in tests and f"`{name}`" in guide, name
