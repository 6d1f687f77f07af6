"""A shared system prompt: prompt tokens that prefix caching saves, stock vLLM against momentkv.

    PYTHONPATH=benchmarks python -m serving.prefix

40 requests share a system prompt and ask questions of different lengths; at most 8 run at a time, and with eviction on every one
of them evicts. Each engine runs in a process of its own and is real throughout; the weights are random.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from serving import model
from tqdm import tqdm

EVICTION = {"policy": "momentkv", "budget_tokens": 1024}
SYSTEM_TOKENS = (768, 1536)
REQUESTS, RUNNING, NEW_TOKENS, CHUNK = 40, 8, 16, 2048


def load(system_tokens: int) -> list[list[int]]:
    """Token ids of every request: the system prompt, then 300 to 690 tokens of its own."""
    system = [5 + 7 * i % 8000 for i in range(system_tokens)]
    return [system + [5 + (13 * i + 101 * n) % 8000 for i in range(300 + 10 * n)] for n in range(REQUESTS)]


def serve(task: dict) -> dict[str, float]:
    """In the child: run the load once; prompt tokens, those served from the cache, seconds."""
    from serving.measure import SamplingParams  # sets vLLM's environment first
    from vllm import EngineArgs, LLMEngine

    # Stock's smallest page on a CPU is 32 tokens: the finest hits it can offer.
    extra = {"additional_config": {"kv_eviction": task["eviction"]}} if task["eviction"] else {"block_size": 32}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=task["model"], skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=RUNNING,
            max_num_batched_tokens=CHUNK, **extra,
        )
    )  # fmt: skip
    prompts = load(task["system_tokens"])
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    cached, start = 0, time.perf_counter()
    while engine.has_unfinished_requests():
        cached += sum(o.num_cached_tokens for o in engine.step() if o.finished)
    seconds = time.perf_counter() - start
    return {"prompt_tokens": sum(map(len, prompts)), "cached_tokens": cached, "seconds": seconds}


def measure(**task) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "serving.prefix", json.dumps(task)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(SYSTEM_TOKENS), desc="engines") as bar:
        path = str(model.make(Path(folder), 64))
        for system_tokens in SYSTEM_TOKENS:
            runs = {}
            for name, eviction in (("stock", None), ("momentkv", EVICTION)):
                runs[name] = measure(model=path, eviction=eviction, system_tokens=system_tokens)
                bar.update()
            rows.append(
                {
                    "system_tokens": system_tokens,
                    "prompt_tokens": runs["stock"]["prompt_tokens"],
                    "cached_stock": runs["stock"]["cached_tokens"],
                    "cached_momentkv": runs["momentkv"]["cached_tokens"],
                    "saving_to_stock": runs["momentkv"]["cached_tokens"] / runs["stock"]["cached_tokens"],
                    "seconds_to_stock": runs["momentkv"]["seconds"] / runs["stock"]["seconds"],
                }
            )
    print(report.table([list(rows[0]), *(list(r.values()) for r in rows)]))
    limit = report.target("prompt tokens saved / stock, prefix below the budget", rows[0]["saving_to_stock"], 0.9)
    report.write("prefix_cache", rows, [limit])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("RESULT", json.dumps(serve(json.loads(sys.argv[1]))), flush=True)
    else:
        main()
