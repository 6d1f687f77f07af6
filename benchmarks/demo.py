"""`make demo`: a real `vllm serve` answers questions over long prompts from a KV pool too small for them.

Starts stock vLLM in a pool that is large enough, then momentkv and streamingllm in a small one, asks all the same questions
through the openai client (several at once, streaming), and prints right answers, agreement with the full cache, live KV tokens
per sequence and the concurrency that vLLM reports. Then one sequence grows alone, and the plot shows what it holds.
"""

import argparse
import concurrent.futures
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import openai  # noqa: E402
import report  # noqa: E402
from divergence import mean_kl  # noqa: E402
from quality.questions import Question, ruler_questions, running_texts  # noqa: E402
from quality.wording import Compact  # noqa: E402
from server import Server  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

CONTEXT, BUDGET, SEQUENCES = 1024, 256, 6
TASKS = ("niah_multikey_1", "vt", "qa_1")
STEP, ANSWER = 250, 64
"""Tokens between two lengths of the growing sequence, and how many it generates at each."""
MAX_LEN = 4096
MODEL_NAME = "test-model"
COMMON = ["--max-num-batched-tokens", "256", "--max-model-len", str(MAX_LEN)]
SMALL_POOL = ["--block-size", "16", "--num-gpu-blocks-override", "129"]
SERVERS = {
    "stock": ["--block-size", "32", "--num-gpu-blocks-override", "513", "--no-enable-prefix-caching"],
    "momentkv": ["--kv-eviction", "momentkv", "--kv-budget", str(BUDGET), *SMALL_POOL],
    "streamingllm": ["--kv-eviction", "streamingllm", "--kv-budget", str(BUDGET), *SMALL_POOL],
}
"""128 pages of 16 hold 2,048 tokens: two of the six long sequences with a full cache, eight with a budget of 256."""


@dataclass
class Run:
    """What one server showed."""

    right: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    text: list[dict[str, float]] = field(default_factory=list)
    growth: list[tuple[int, float]] = field(default_factory=list)
    concurrency: float = 0.0
    pool_tokens: int = 0


def ask(client: openai.OpenAI, one: Question) -> str:
    """Stream an answer."""
    given = {"model": MODEL_NAME, "max_tokens": one.answer_tokens, "temperature": 0}
    stream = client.completions.create(prompt=one.prompt, stream=True, **given)
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def next_token(client: openai.OpenAI, text: str) -> dict[str, float]:
    """Log-probabilities of the 20 likeliest next tokens."""
    answer = client.completions.create(model=MODEL_NAME, prompt=text, max_tokens=1, temperature=0, logprobs=20)
    return answer.choices[0].logprobs.top_logprobs[0]


def grow(server: Server, client: openai.OpenAI, pool_tokens: int, words: list[str]) -> list[tuple[int, float]]:
    """One sequence alone at growing lengths: (its tokens, KV tokens it holds while it answers)."""
    points: list[tuple[int, float]] = []
    for length in range(STEP, MAX_LEN - ANSWER, STEP):
        prompt = " ".join(words[: length - 1])
        stream = client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            max_tokens=ANSWER,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        # Not at the first token: the pages of the last prefill chunk are freed with the next step.
        next(stream), next(stream)
        live = server.metrics("vllm:")["vllm:kv_cache_usage_perc"] * pool_tokens
        list(stream)
        if live > 0:  # else the answer was complete before the question of how much it holds
            points.append((length, live))
    return points


def run_server(name: str, model: Path, questions: list[Question], texts: list[str], folder: Path) -> Run:
    server = Server(model, *SERVERS[name], *COMMON, folder=folder, name=MODEL_NAME, threads=2)
    result = Run()
    try:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        result.concurrency = float(
            re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", server.log)[1]
        )
        block, pages = (
            int(SERVERS[name][SERVERS[name].index(o) + 1]) for o in ("--block-size", "--num-gpu-blocks-override")
        )
        result.pool_tokens = block * (pages - 1)
        with concurrent.futures.ThreadPoolExecutor(SEQUENCES) as pool:
            jobs = pool.map(lambda q: ask(client, q), questions)
            result.answers = list(tqdm(jobs, total=len(questions), desc=name, unit="question"))
            result.text = list(pool.map(lambda t: next_token(client, t), texts))
        for task in TASKS:
            marks = [q.score(a) for a, q in zip(result.answers, questions, strict=True) if q.task == task]
            result.right[task] = sum(marks) / len(marks)
        words = " ".join(texts).split()
        result.growth = grow(server, client, result.pool_tokens, words)
    finally:
        server.stop()
    return result


def agreement(run: Run, stock: Run) -> tuple[float, float]:
    """(share of answer words equal to the full cache's, mean KL over its 20 likeliest next tokens on text)."""
    both = zip(stock.answers, run.answers, strict=True)
    pairs = [(a, b) for x, y in both for a, b in zip(x.split(), y.split(), strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs), mean_kl(stock.text, run.text)


def plot(runs: dict[str, Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, run in runs.items():
        axes.plot(*zip(*run.growth, strict=True), label=name)
    axes.axhline(BUDGET, color="grey", linestyle=":", label=f"--kv-budget {BUDGET}")
    axes.set(
        xlabel="tokens of the sequence", ylabel="KV tokens it holds (vLLM's gauge)", title="One sequence, vllm serve"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "test_model/checkpoint")
    parser.add_argument("--questions", type=int, default=16, help="per task")
    args = parser.parse_args()
    tokenizer, wording = AutoTokenizer.from_pretrained(args.model), Compact()
    questions = ruler_questions(TASKS, wording, tokenizer, CONTEXT, args.questions, seeds=[7], chat=False)
    texts = running_texts(wording, "", tokenizer, CONTEXT, args.questions)
    began = time.monotonic()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SERVERS:
            print(f"vllm serve {' '.join(SERVERS[name])}", flush=True)
            runs[name] = run_server(name, args.model, questions, texts, Path(folder))
    rows = [
        [
            "server",
            *TASKS,
            "same words",
            "KL",
            "most KV tokens of one sequence",
            "pool tokens",
            f"concurrency at {MAX_LEN}",
        ]
    ]
    for name, run in runs.items():
        same, kl = agreement(run, runs["stock"])
        peak = round(max(live for _, live in run.growth))
        rows.append(
            [name, *(run.right[t] for t in TASKS), same, f"{kl:.4f}", peak, run.pool_tokens, f"{run.concurrency:.1f}x"]
        )
    print(report.table(rows))
    report.RESULTS.mkdir(exist_ok=True)
    plot(runs, report.RESULTS / "demo.png")
    ours = max(live for _, live in runs["momentkv"].growth)
    # Few questions, +-0.1: a demo that answers at random must fail, the exact figure is the benchmark's (make bench-quality-toy).
    targets = [
        report.target("momentkv: KV tokens of one sequence", ours, BUDGET, at_least=False),
        report.target(
            "momentkv: niah_multikey_1, against stock",
            runs["momentkv"].right["niah_multikey_1"] / runs["stock"].right["niah_multikey_1"],
            0.8,
        ),
    ]
    report.write("demo", {"table": rows, "growth": {n: r.growth for n, r in runs.items()}}, targets)
    print(f"plot: {report.RESULTS / 'demo.png'}; {time.monotonic() - began:.0f} s in all")
    return 0 if all(t["ok"] for t in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
