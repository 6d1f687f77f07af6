"""A shared system prompt: prompt tokens that prefix caching saves, stock vLLM against momentkv.

40 requests share a system prompt and ask questions of different lengths; at most 8 run at a time, and with eviction on every one
of them evicts. Each engine runs in a process of its own. Scheduler, block manager, requests and steps are real; what is found in
the cache depends on no number of the model's, so its layers are skipped.
"""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import child
import report
import torch
from benchmark import Benchmark
from serving.resume import make_model
from tqdm import tqdm

HIDDEN = 128
EVICTION = {"policy": "momentkv", "budget_tokens": 1024}
SYSTEM_TOKENS = (768, 1536)
REQUESTS, RUNNING, NEW_TOKENS, CHUNK, POOL_TOKENS = 40, 8, 16, 2048, 1 << 17


def load(system_tokens: int) -> list[list[int]]:
    """Token ids of every request: the system prompt, then 300 to 690 tokens of its own."""
    system = [5 + 7 * i % 990 for i in range(system_tokens)]
    return [system + [5 + (13 * i + 101 * n) % 990 for i in range(300 + 10 * n)] for n in range(REQUESTS)]


def serve(task: dict[str, Any]) -> dict[str, int]:
    """In the child: run the load once; prompt tokens, and those served from the cache."""
    from serving import engine

    # Stock's smallest page on a CPU is 32 tokens: the finest hits it can offer.
    page = 16 if task["eviction"] else 32
    served = engine.start(
        task["model"], task["eviction"], max_num_seqs=RUNNING, max_num_batched_tokens=CHUNK, block_size=page,
        num_gpu_blocks_override=POOL_TOKENS // page,
    )  # fmt: skip
    model = served.model_executor.driver_worker.worker.model_runner.model
    model.forward = lambda input_ids, positions, *args, **kwargs: torch.zeros(
        len(positions), HIDDEN, dtype=torch.bfloat16
    )
    prompts = load(task["system_tokens"])
    for number, prompt in enumerate(prompts):
        engine.add(served, str(number), prompt, NEW_TOKENS)
    cached = 0
    while served.has_unfinished_requests():
        cached += sum(o.num_cached_tokens for o in served.step() if o.finished)
    return {"prompt_tokens": sum(map(len, prompts)), "cached_tokens": cached}


def measure(_: Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(SYSTEM_TOKENS), desc="engines") as bar:
        path = make_model(Path(folder), hidden=HIDDEN, head_dim=64)
        for system_tokens in SYSTEM_TOKENS:
            runs = {}
            for name, eviction in (("stock", None), ("momentkv", EVICTION)):
                task = {"model": path, "eviction": eviction, "system_tokens": system_tokens}
                (runs[name],) = child.results("serving.prefix", task)
                bar.update()
            cached = {f"cached_{name}": run["cached_tokens"] for name, run in runs.items()}
            rows.append({"system_tokens": system_tokens, "prompt_tokens": runs["stock"]["prompt_tokens"], **cached})
            rows[-1]["saving_to_stock"] = cached["cached_momentkv"] / cached["cached_stock"]
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("prefix below the budget", "prefix of 1.5 budgets")
    return [
        report.target(f"prompt tokens saved / stock, {name}", row["saving_to_stock"], 0.95)
        for name, row in zip(names, rows, strict=True)
    ]


def draw(rows: list[dict[str, Any]], axes: Any) -> None:
    for shift, name in ((-0.2, "stock"), (0.2, "momentkv")):
        shares = [row[f"cached_{name}"] / row["prompt_tokens"] for row in rows]
        axes.bar([place + shift for place in range(len(rows))], shares, 0.4, label=name)
    axes.set_xticks(range(len(rows)), [f"{row['system_tokens']} tokens of system prompt" for row in rows])
    axes.set(ylabel="share of prompt tokens from the cache", ylim=(0, 1))
    axes.legend()


BENCHMARK = Benchmark("prefix", measure, lambda rows: [report.rows_of(rows)], targets, draw, size=(6, 4))

if __name__ == "__main__":
    if task := child.task():
        child.tell(serve(task))
    else:
        BENCHMARK.run()
