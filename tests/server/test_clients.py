"""The clients of docs/clients.md as a user runs them, on one real server that evicts."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import environments
import openai
import pytest
from named_files import ROOT
from real_model import folder
from server import Server

MODEL = folder.find()
CLIENTS = ROOT / "docs/clients"
DOCUMENT = ROOT / "benchmarks/demo/data/lighthouse.txt"
# 256 tokens of memory hold about 800 in this model's store: prompts of 1,000 lose some. Float32, so that tokens are decided.
OPTIONS = ["--kv-eviction", "momentkv", "--kv-budget", "256", "--max-model-len", "4096", "--dtype", "float32"]
OPTIONS += ["--max-num-batched-tokens", "512"]

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(MODEL is None, reason=folder.WHY_NOT),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(MODEL, *OPTIONS, folder=tmp_path_factory.mktemp("clients"), name="smollm2").wait_ready()
    yield running
    running.stop()


@pytest.fixture
def evicted(server):
    """Fails a client during which no token was evicted."""
    before = server.metrics()["momentkv:evicted_tokens_total"]
    yield
    assert server.metrics()["momentkv:evicted_tokens_total"] > before


def run(command: list, programs: Path = Path(sys.executable).parent) -> str:
    """Its standard output; `programs` come first on the path."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def programs(name: str) -> Path:
    try:
        return environments.programs(name)
    except environments.NotMade as why:
        pytest.skip(str(why))


def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def told(server, question: str, max_tokens: int) -> str:
    """The whole answer to a question on the document."""
    asked = [{"role": "user", "content": f"{DOCUMENT.read_text()}\n\n{question}"}]
    said = client(server).chat.completions.create(model="smollm2", messages=asked, max_tokens=max_tokens, temperature=0)
    return said.choices[0].message.content


def test_openai(server, evicted):
    """The stream says what is said in one piece; the second turn's prompt contains the first turn."""
    said = run(["python", "-P", CLIENTS / "openai_client.py", server.url, "smollm2", DOCUMENT])
    streamed, first, title, second = said.splitlines()
    assert streamed == told(server, "What is this text about? Answer in two sentences.", 60) and title
    prompt, answer, longer = (int(n) for n in re.findall(r"\d+", first + second))
    assert 1200 < prompt < prompt + answer < longer


def test_langchain(server, evicted):
    """The stream and the batch say the same, and what the openai client is told."""
    python = programs("langchain") / "python"
    streamed, first, second = run(
        [python, "-P", CLIENTS / "langchain_client.py", server.url, "smollm2", DOCUMENT]
    ).splitlines()
    question, other = "What is this text about?", "Who is the text written for?"
    assert first == f"{question} {streamed}" and second.startswith(other)
    assert streamed == told(server, f"{question} Answer in one sentence.", 40)


def test_vllm_bench(server, evicted, tmp_path):
    run(
        [
            CLIENTS / "vllm_bench.sh",
            server.url,
            "smollm2",
            MODEL,
            "--save-result",
            "--result-filename",
            tmp_path / "found.json",
        ]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (8, 0, 8 * 64)
    assert found["total_input_tokens"] == pytest.approx(8 * 1024, rel=0.02)
    assert found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0


def test_guidellm(server, evicted, tmp_path):
    path = tmp_path / "found.json"
    run([CLIENTS / "guidellm.sh", server.url, "smollm2", MODEL, path], programs("guidellm"))
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["metrics"]["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
    for request in found["requests"]["successful"]:
        assert request["output_tokens"] == 32 and request["prompt_tokens"] == pytest.approx(1024, rel=0.02)


@pytest.fixture(scope="module")
def evaluated(server, tmp_path_factory) -> dict[str, list[dict]]:
    """Samples of lm-eval by task: the first four of eight."""
    out = tmp_path_factory.mktemp("lm_eval")
    run([CLIENTS / "lm_eval.sh", server.url, "smollm2", MODEL, out, "--limit", "4"], programs("lm_eval"))
    files = {task: next(out.rglob(f"samples_{task}_*.jsonl")) for task in ("codes_said", "codes_chosen")}
    return {task: [json.loads(line) for line in file.read_text().splitlines()] for task, file in files.items()}


def test_lm_eval_is_told_what_the_openai_client_is(server, evaluated):
    asked = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in evaluated["codes_said"]]

    def ask(prompt: str) -> str:
        said = client(server).completions.create(
            model="smollm2", prompt=prompt, max_tokens=8, temperature=0, stop=["\n", "."]
        )
        return said.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        told = list(threads.map(ask, asked))
    assert [sample["resps"][0][0] for sample in evaluated["codes_said"]] == told
    for sample, text in zip(evaluated["codes_said"], told):
        right = sample["doc"]["words"][sample["doc"]["answer"]]
        assert sample["exact_match"] == (re.search("[A-Za-z]+", text)[0].lower() == right), (text, right)


def test_lm_eval_s_choices_have_the_prompt_s_log_probabilities(server, evaluated):
    """Text and choice as a prompt: the log-probabilities of its last tokens, beyond those of the text alone."""
    sample = evaluated["codes_chosen"][0]
    for number, response in enumerate(sample["resps"]):
        text, choice = (sample["arguments"][f"gen_args_{number}"][f"arg_{i}"] for i in range(2))
        lengths = [
            client(server).completions.create(model="smollm2", prompt=p, max_tokens=1).usage.prompt_tokens
            for p in (text, text + choice)
        ]
        said = client(server).completions.create(
            model="smollm2", prompt=text + choice, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        places = said.choices[0].prompt_logprobs[lengths[0] :]
        assert len(places) == lengths[1] - lengths[0] > 0
        own = sum(next(iter(place.values()))["logprob"] for place in places)
        # In another batch a number can fall on the other side of a rounding step of the 8-bit store.
        assert float(response[0][0]) == pytest.approx(own, abs=0.02)


def test_the_task_s_data_is_what_its_program_makes():
    made = run(["python", "-P", "-c", f"import sys; sys.path.append({str(CLIENTS / 'lm_eval_tasks')!r})\n"
                                      "import json, make\nprint(*map(json.dumps, make.rows()), sep='\\n')"])  # fmt: skip
    assert made == (CLIENTS / "lm_eval_tasks/codes.jsonl").read_text()
