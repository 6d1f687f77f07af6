"""The quality harness: what is compared, what the targets say of hand-made results, and a small run of it all."""

import http.server
import json
import math
import threading
from dataclasses import replace

import pytest
import report
from evaluation.quality import run
from evaluation.quality.cells import FP8, FULL, OFF, OURS, Cell, cells
from evaluation.quality.results import Result, mean_error
from evaluation.quality.show import groups, plot, tables, targets
from server import Server
from transformers import AutoTokenizer

from momentkv_vllm.config import EvictionConfig

FIRST, EXACT = "snapkv, first", "momentkv, 16 bit"


def test_equal_bytes_and_equal_tokens(capsys):
    """Head dimension 64: a record with a covariance takes three pages of 16 tokens, its means one, and no page of its own in a
    quantised store."""
    found = list(cells([FIRST, EXACT, OURS, "knorm", FP8], [512, 64], ["chunked", "full"], 1024, 64))
    assert found[:2] == [Cell(FULL), Cell(FP8, budget_tokens=512)]
    at_512 = [c for c in found if c.budget_tokens == 512 and c.prefill == "full"]
    assert [(c.method, c.column, c.state_tokens) for c in at_512] == [
        (FIRST, "bytes", 0), (FIRST, "tokens", 48), (EXACT, "bytes", 0), (EXACT, "tokens", 16), (OURS, "bytes", 0),
        ("knorm", "bytes", 0),
    ]  # fmt: skip
    assert len({c.name for c in found}) == len(found)
    assert [EvictionConfig.from_dict(c.eviction).budget_tokens for c in at_512] == [512, 560, 512, 528, 512, 512]
    assert {c.engine_options(1024)["additional_config"]["kv_eviction"]["retire_tokens"] for c in at_512} == {16}
    # 64 tokens are four pages: the state of three leaves no room for store and window.
    at_64 = [(c.method, c.column) for c in found if c.budget_tokens == 64 and c.prefill == "chunked"]
    assert at_64 == [(FIRST, "tokens"), (EXACT, "bytes"), (EXACT, "tokens"), (OURS, "bytes"), ("knorm", "bytes")]
    assert (
        f"left out: {FIRST} / chunked / 64 / equal bytes: kv_eviction.budget_tokens=64 is too small"
        in capsys.readouterr().out
    )


def test_nothing_evicts_without_a_budget():
    assert "additional_config" not in Cell(FULL).engine_options(512)
    fp8 = Cell(FP8, budget_tokens=256).engine_options(512)
    assert fp8["kv_cache_dtype"] == "fp8" and "additional_config" not in fp8


def test_mean_error():
    assert mean_error([0.0, 1.0, 1.0, 0.0]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert mean_error([1.0]) == (1.0, math.inf)


def result(method, scores, kl, prefill="chunked", budget=256, column="bytes", state=0):
    cell = Cell(method, prefill, budget, column, state)
    return Result(cell, {t: list(map(float, s)) for t, s in scores.items()}, kl, 2.0)


def by_name(results):
    return {t["name"].split(" (")[0]: t for t in targets(results)}


def test_targets_of_a_method_that_wins():
    found = by_name([
        result(OURS, {"a": [1, 1, 1, 1], "b": [1, 1, 0, 1]}, 0.1),
        result(OFF, {"a": [1, 1, 1, 1], "b": [1, 0, 0, 1]}, 0.3),
        result("knorm", {"a": [1, 0, 0, 0], "b": [1, 1, 0, 1]}, 0.4),
        result("paper", {"a": [1, 1, 0, 0], "b": [0, 0, 0, 1]}, 0.25),
        # Equal tokens are no part of the targets.
        result(OURS, {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0]}, 9.0, column="tokens", state=32),
    ])  # fmt: skip
    assert all(t["ok"] for t in found.values()), found
    assert found["against baselines: cells lost beyond noise, of 2"]["value"] == 0
    assert found["against baselines: b, budget 256 chunked, against knorm"]["value"] == 0
    # Means 0.875 against knorm's 0.5 and paper's 0.375.
    assert found["mean lead over the best baseline"]["value"] == pytest.approx(0.375)
    assert found["KL / best baseline's, worst: budget 256 chunked, against paper"]["value"] == pytest.approx(0.4)


def test_targets_of_a_method_that_loses():
    """Losing one of four questions is noise (error 0.25); losing all of them is not."""
    found = by_name([
        result(OURS, {"a": [0, 0, 0, 0], "b": [1, 1, 0, 1]}, 0.2),
        result(OFF, {"a": [1, 1, 1, 1], "b": [1, 1, 0, 1]}, 0.3),
        result("knorm", {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}, 0.3),
        result(OURS, {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}, 0.1, budget=128),
        result("knorm", {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}, 0.3, budget=128),
    ])  # fmt: skip
    assert not any(t["ok"] for t in found.values()), found
    lost, worst = (
        found["against baselines: cells lost beyond noise, of 4"],
        found["against baselines: a, budget 256 chunked, against knorm"],
    )
    assert lost["value"] == 1 and (worst["value"], worst["limit"]) == (-1, 0)
    assert found["correction: cells lost beyond noise, of 2"]["value"] == 1
    assert found["mean lead over the best baseline"]["value"] == pytest.approx((0.375 - 1 + 0) / 2)
    assert found["KL / best baseline's, worst: budget 256 chunked, against knorm"]["value"] == pytest.approx(2 / 3)


def test_no_targets_without_baselines():
    assert targets([result(OURS, {"a": [1, 1]}, 0.1)]) == []
    assert targets([Result(Cell("full"), {"a": [1.0]}, 0.0, 2.0), Result(Cell("other"), {"a": [1.0]}, 0.1, 2.0)]) == []


def test_tables_and_plot(tmp_path):
    """fp8 stands at its own budget and among equal bytes only; a method without a state is in both columns."""
    results = [
        Result(Cell(FULL), {"a": [1.0, 1.0]}, 0.0, 2.0), Result(Cell(FP8, budget_tokens=256), {"a": [1.0, 0.0]}, 0.01, 2.0),
        result(OURS, {"a": [1, 1]}, 0.1), result(OURS, {"a": [1, 0]}, 0.1, column="tokens", state=32),
        result("knorm", {"a": [0, 0]}, 0.1), result("knorm", {"a": [0, 0]}, 0.1, budget=128),
    ]  # fmt: skip
    blocks = {b.split("\n")[0]: b for b in tables(results).split("\n\n### ")}
    rows = {head: [line.split("|")[1].strip() for line in b.split("\n")[4:]] for head, b in blocks.items()}
    assert rows == {
        "### budget 256 tokens, chunked prefill, equal bytes": [FULL, FP8, OURS, "knorm"],
        "budget 128 tokens, chunked prefill, equal bytes": [FULL, "knorm"],
        "budget 256 tokens, chunked prefill, equal tokens": [FULL, OURS, "knorm"],
        "budget 128 tokens, chunked prefill, equal tokens": [FULL, "knorm"],
    }
    assert groups(results, "tokens")[256, "chunked"][OURS].mean == 0.5
    plot(results, 1024, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"--url 127.0.0.1:8000 is not NAME=URL, e.g. full=http"):
        run.servers(["127.0.0.1:8000"])
    assert run.servers(["full=http://a:1", "x=http://b:2/v?q=1"]) == {"full": "http://a:1", "x": "http://b:2/v?q=1"}


SMALL = [
    "--tasks", "niah_single_2", "vt", "text", "--context", "320", "--samples", "2", "--seeds", "1", "2", "--texts", "2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(600)
def test_a_small_run(tmp_path, monkeypatch):
    """One budget, two methods, both columns, chunked: everything is written, and what is done is not run again."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "RAW", tmp_path / "raw")
    one_budget = "--budgets 160 --methods momentkv streamingllm --prefill chunked --out small"
    arguments = [*SMALL, *one_budget.split()]
    run.main(arguments)
    written = json.loads((tmp_path / "results/small.json").read_text())
    found = {(c["method"], c["column"]): c for c in written["results"]["cells"]}
    assert list(found) == [(FULL, "bytes"), (OURS, "bytes"), ("streamingllm", "bytes")]
    for cell in found.values():
        assert set(cell["tasks"]) == {"niah_single_2", "vt"} and 0 <= cell["mean"] <= 1
        # An untrained guess among 840 words has perplexity 840.
        assert 1 < cell["perplexity"] < 300 and cell["kl"] >= 0
    assert found[FULL, "bytes"]["kl"] == 0 and found[FULL, "bytes"]["mean"] >= 0.5
    assert all(c["kl"] > 0 for name, c in found.items() if name[0] != FULL), "half of the context was evicted"
    assert len({t["name"] for t in written["targets"]}) == 4 and written["machine"]["vllm"]
    assert (tmp_path / "results/small.png").exists()

    monkeypatch.setattr(run, "ask_engine", lambda *_: pytest.fail("a finished cell ran again"))
    run.main(arguments)
    again = json.loads((tmp_path / "results/small.json").read_text())
    assert again["results"] == written["results"] and again["targets"] == written["targets"]


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_server_and_an_engine_agree(tmp_path, monkeypatch):
    """The same model and budget behind `vllm serve --kv-eviction` and in process: same answers, same distributions."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    options = ["--max-model-len", "320", "--dtype", "bfloat16", "--kv-eviction", OURS, "--kv-budget", "160"]
    tokenizer = AutoTokenizer.from_pretrained(run.TEST_MODEL)
    asked, texts = run.questions.make(run.parse(SMALL), tokenizer)
    server = Server(run.TEST_MODEL, *options, folder=tmp_path)
    try:
        server.wait_ready()
        run.main([*SMALL, "--url", f"first={server.url}", "--url", f"again={server.url}/", "--out", "servers"])
        served = run.ask(run.Endpoint(server.url, tokenizer), asked, texts)
        chat = run.Endpoint(server.url, tokenizer).answers([replace(q, chat=True) for q in asked[:2]])
    finally:
        server.stop()
    first, again = json.loads((tmp_path / "servers.json").read_text())["results"]["cells"]
    assert (first["method"], again["method"], first["kl"]) == ("first", "again", 0)
    # The order in which requests meet in a batch changes the rounding.
    assert again["kl"] < 1e-3 and again["mean"] == pytest.approx(first["mean"], abs=0.13)
    assert chat == served["said"][:2], "this model's chat template is the prompt itself"

    local = run.ask(run.InProcess(str(run.TEST_MODEL), **Cell(OURS, "chunked", 160).engine_options(320)), asked, texts)
    assert sum(a == b for a, b in zip(local["said"], served["said"])) >= len(asked) - 1
    # The server is asked at every eighth of the places that the engine reads one by one.
    at_its_places = {"said": [], "known": local["known"][::8], "loss": served["loss"]}
    assert run.judge(Cell("served"), {**served, "said": []}, at_its_places, []).kl < 1e-3


class NoExtensions(http.server.BaseHTTPRequestHandler):
    """OpenAI's API and nothing more: it ignores what it does not know."""

    def do_GET(self):
        self._reply({"object": "list", "data": [{"id": "some model", "object": "model"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        logprobs = {"tokens": [" yes"], "token_logprobs": [-0.1], "top_logprobs": [{" yes": -0.1}]}
        self._reply({"object": "text_completion", "choices": [{"index": 0, "text": " yes", "logprobs": logprobs}]})

    def _reply(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


def test_any_server_answers_questions_and_vllm_is_needed_for_kl():
    tokenizer = AutoTokenizer.from_pretrained(run.TEST_MODEL)
    asked, texts = run.questions.make(run.parse(SMALL), tokenizer)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoExtensions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        who = run.Endpoint(f"http://127.0.0.1:{server.server_port}/", tokenizer)
        assert who.answers(asked) == [" yes"] * len(asked)
        with pytest.raises(RuntimeError, match="leave out --tasks text"):
            who.continuations(texts)
        server.shutdown()
