"""Long texts that come again: prompt tokens computed, stock vLLM against momentkv with and without states.

Conversations: three of 20 turns each, in turns, that grow to eight budgets. Documents: six of eight budgets, eight questions on
each, round robin. Each kind of engine runs in a process of its own and is real throughout. Token counts are exact: they depend on
neither machine nor weights, so the model is small. What it does to the time is measured apart (resume_time.py).
"""

import random
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child
import random_llama
import report
from benchmark import Benchmark
from tqdm import tqdm

BUDGET, LONG = 512, 8 * 512
TURNS, CONVERSATIONS, ANSWER = 20, 3, 16
DOCUMENTS, QUESTIONS = 6, 8
LOADS = {"conversations": LONG, "documents": 2 * LONG}
"""Tokens of the small pool: one conversation at its end, two documents of stock's."""
AMPLE = 1 << 17
EVICTION = {"policy": "momentkv", "budget_tokens": BUDGET}
ENGINES = {"stock": None, "momentkv": EVICTION, "momentkv, no states": EVICTION | {"state_share": 0}}
PAGE = 32
"""Stock's smallest on a CPU, and then the same for both: what differs is the states."""

Ask = Callable[[list[int]], list[int]]


def words(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(4, 1000) for _ in range(tokens)]


def conversations(ask: Ask) -> None:
    rng = random.Random(0)
    histories = [words(rng, 64) for _ in range(CONVERSATIONS)]
    for _ in range(TURNS):
        for history in histories:
            history += words(rng, (LONG - 64) // TURNS - ANSWER)
            history += ask(history)


def documents(ask: Ask) -> None:
    rng = random.Random(1)
    texts = [words(rng, LONG) for _ in range(DOCUMENTS)]
    for _ in range(QUESTIONS):
        for text in texts:
            ask(text + words(rng, rng.randrange(20, 80)))


def serve(model: str, eviction: dict | None, load: str, pool: int) -> dict[str, int]:
    """In the child: run a load once; its prompt tokens, and those that were computed."""
    from serving import engine

    served = start(model, eviction, pool // PAGE + 40)
    found = {"requests": 0, "prompt_tokens": 0, "computed_tokens": 0}

    def ask(prompt: list[int]) -> list[int]:
        engine.add(served, str(found["requests"]), prompt, ANSWER)
        outputs = [o for o in iterate(served) if o.finished]
        found["requests"] += 1
        found["prompt_tokens"] += len(prompt)
        found["computed_tokens"] += len(prompt) - outputs[0].num_cached_tokens
        return list(outputs[0].outputs[0].token_ids)

    {"conversations": conversations, "documents": documents}[load](ask)
    served.engine_core.shutdown()
    return found


def start(model: str, eviction: dict | None, pages: int):
    """In a child: an engine for four texts of LONG tokens."""
    from serving import engine

    return engine.start(
        model, eviction, max_num_seqs=4, block_size=PAGE, max_num_batched_tokens=BUDGET, max_model_len=LONG + 1024,
        num_gpu_blocks_override=pages,
    )  # fmt: skip


def iterate(served) -> Iterator:
    while served.has_unfinished_requests():
        yield from served.step()


def cells(engine: str) -> list[tuple[str, str, int]]:
    """Loads and pools, with tokens of the pool; without states a larger pool changes nothing."""
    pools = {"small": LOADS} | ({} if engine == "momentkv, no states" else {"ample": dict.fromkeys(LOADS, AMPLE)})
    return [(load, kind, tokens[load]) for load in LOADS for kind, tokens in pools.items()]


def make_model(
    folder: Path, layers: int = 1, hidden: int = 64, heads: int = 2, kv_heads: int = 1, head_dim: int = 32
) -> str:
    """Random weights, 1,000 words."""
    size = {"hidden": hidden, "mlp": 2 * hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return str(random_llama.make(folder, words=1000, head_dim=head_dim, context=LONG + 1024, **size))


def targets(found: dict[str, dict[str, int]]) -> list[dict]:
    """Of issue 20: shares of prompt tokens computed."""

    def computed(load: str, pool: str, engine: str) -> int:
        return found[f"{load}, {pool} pool, {engine}"]["computed_tokens"]

    def to_stock(load: str, pool: str) -> float:
        return computed(load, pool, "momentkv") / computed(load, pool, "stock")

    again = found["documents, small pool, stock"]["prompt_tokens"] - DOCUMENTS * LONG
    saved = again - (computed("documents", "small", "momentkv") - DOCUMENTS * LONG)
    return [
        report.target("conversations, ample pool: computed / stock's", to_stock("conversations", "ample"), 1.3, False),
        report.target("conversations, small pool: computed / stock's", to_stock("conversations", "small"), 1.0, False),
        report.target("documents, small pool: computed / stock's", to_stock("documents", "small"), 1.0, False),
        report.target("documents, small pool: saved of what came again", saved / again, 0.9),
    ]


def options(parser) -> None:
    parser.add_argument("--only-time", action="store_true", help="measure the times again, keep the counts")


def measure(args: Namespace) -> dict[str, Any]:
    # It imports this module.
    from serving import resume_time

    if args.only_time:
        return BENCHMARK.known() | {"time": resume_time.measure()}
    found: dict[str, Any] = {}
    total = sum(len(cells(name)) for name in ENGINES)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, desc="loads") as bar:
        path = make_model(Path(folder))
        for name in ENGINES:
            for cell, counts in child.results("serving.resume", {"engine": name, "model": path}):
                found[cell] = counts | {"share": counts["computed_tokens"] / counts["prompt_tokens"]}
                bar.update()
    return found | {"time": resume_time.measure()}


def tables(found: dict[str, Any]) -> list[list[list]]:
    return [report.rows_of([{"load, pool, engine": n, **c} for n, c in found.items() if n != "time"])]


def all_targets(found: dict[str, Any]) -> list[dict]:
    from serving import resume_time

    return targets(found) + resume_time.targets(found["time"])


def draw(found: dict[str, Any], axes: Any) -> None:
    for name, milliseconds in found["time"]["turns"].items():
        axes.plot(range(1, len(milliseconds) + 1), milliseconds, "o-", label=name)
    axes.set_xticks(range(1, 21, 3))
    axes.set(xlabel="turn of a conversation", ylabel="time to the first token (CPU ms)", ylim=(0, None))
    axes.legend()


BENCHMARK = Benchmark("resume", measure, tables, all_targets, draw, size=(6, 4), options=options)

if __name__ == "__main__":
    if task := child.task():
        for load, kind, pool in cells(task["engine"]):
            counts = serve(task["model"], ENGINES[task["engine"]], load, pool)
            child.tell([f"{load}, {kind} pool, {task['engine']}", counts])
    else:
        BENCHMARK.run()
