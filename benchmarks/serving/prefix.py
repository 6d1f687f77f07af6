"""A shared system prompt: prompt tokens that prefix caching saves, stock vLLM against momentkv.

    PYTHONPATH=benchmarks python -m serving.prefix

40 requests share a system prompt and ask questions of different lengths; at most 8 run at a time, and with eviction on every one
of them evicts. Each engine runs in a process of its own. Scheduler, block manager, requests and steps are real; what is found in
the cache depends on no number of the model's, so its layers are skipped.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import report
import torch
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


def serve(task: dict) -> dict[str, int]:
    """In the child: run the load once; prompt tokens, and those served from the cache."""
    from serving.measure import SamplingParams  # sets vLLM's environment first
    from vllm import EngineArgs, LLMEngine

    # Stock's smallest page on a CPU is 32 tokens: the finest hits it can offer.
    page = 16 if task["eviction"] else 32
    extra = {"additional_config": {"kv_eviction": task["eviction"]}} if task["eviction"] else {}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=task["model"], skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=RUNNING,
            max_num_batched_tokens=CHUNK, block_size=page, num_gpu_blocks_override=POOL_TOKENS // page, **extra,
        )
    )  # fmt: skip
    model = engine.model_executor.driver_worker.worker.model_runner.model
    model.forward = lambda input_ids, positions, *args, **kwargs: torch.zeros(
        len(positions), HIDDEN, dtype=torch.bfloat16
    )
    prompts = load(task["system_tokens"])
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    cached = 0
    while engine.has_unfinished_requests():
        cached += sum(o.num_cached_tokens for o in engine.step() if o.finished)
    return {"prompt_tokens": sum(map(len, prompts)), "cached_tokens": cached}


def measure(**task) -> dict[str, int]:
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
        path = make_model(Path(folder), hidden=HIDDEN, head_dim=64)
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
                }
            )
    print(report.table([list(rows[0]), *(list(r.values()) for r in rows)]))
    names = ("prefix below the budget", "prefix of 1.5 budgets")
    limits = [
        report.target(f"prompt tokens saved / stock, {name}", row["saving_to_stock"], 0.95)
        for name, row in zip(names, rows, strict=True)
    ]
    report.write("prefix_cache", rows, limits)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("RESULT", json.dumps(serve(json.loads(sys.argv[1]))), flush=True)
    else:
        main()
