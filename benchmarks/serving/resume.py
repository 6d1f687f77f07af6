"""Long texts that come again: prompt tokens computed, stock vLLM against momentkv with and without states.

    PYTHONPATH=benchmarks python -m serving.resume

Conversations: three of 20 turns each, in turns, that grow to eight budgets. Documents: six of eight budgets, eight questions on
each, round robin. Each kind of engine runs in a process of its own and is real throughout. Token counts are exact: they depend on
neither machine nor weights, so the model is small. What it does to the time is measured apart (resume_time.py).
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import report
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

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

COLUMNS = ("requests", "prompt_tokens", "computed_tokens", "share")

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
    from serving.measure import SamplingParams  # sets vLLM's environment first
    from vllm import EngineArgs, LLMEngine

    extra = {"additional_config": {"kv_eviction": eviction}} if eviction else {}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model, skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=4, block_size=PAGE,
            max_num_batched_tokens=BUDGET, max_model_len=LONG + 1024, num_gpu_blocks_override=pool // PAGE + 40, **extra,
        )
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True, detokenize=False)
    found = {"requests": 0, "prompt_tokens": 0, "computed_tokens": 0}

    def ask(prompt: list[int]) -> list[int]:
        engine.add_request(str(found["requests"]), {"prompt_token_ids": list(prompt)}, sampling)
        outputs = [o for o in iterate(engine) if o.finished]
        found["requests"] += 1
        found["prompt_tokens"] += len(prompt)
        found["computed_tokens"] += len(prompt) - outputs[0].num_cached_tokens
        return list(outputs[0].outputs[0].token_ids)

    {"conversations": conversations, "documents": documents}[load](ask)
    engine.engine_core.shutdown()
    return found


def iterate(engine) -> Iterator:
    while engine.has_unfinished_requests():
        yield from engine.step()


def cells(engine: str) -> list[tuple[str, str, int]]:
    """Loads and pools, with tokens of the pool; without states a larger pool changes nothing."""
    pools = {"small": LOADS} | ({} if engine == "momentkv, no states" else {"ample": dict.fromkeys(LOADS, AMPLE)})
    return [(load, kind, tokens[load]) for load in LOADS for kind, tokens in pools.items()]


def measure(name: str, model: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Every cell of one engine, in a child."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "serving.resume", name, model],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in child.stdout:
        said.append(line)
        if line.startswith("RESULT "):
            yield tuple(json.loads(line.removeprefix("RESULT ")))
    if child.wait():
        raise SystemExit("".join(said[-60:]))


def make_model(
    folder: Path, layers: int = 1, hidden: int = 64, heads: int = 2, kv_heads: int = 1, head_dim: int = 32
) -> str:
    """Random weights in bfloat16, 1,000 words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=LONG + 1024,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


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


def main() -> None:
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=sum(len(cells(name)) for name in ENGINES), desc="loads") as bar,
    ):
        path = make_model(Path(folder))
        for name in ENGINES:
            for cell, counts in measure(name, path):
                found[cell] = counts | {"share": counts["computed_tokens"] / counts["prompt_tokens"]}
                bar.update()
    print(report.table([["load, pool, engine", *COLUMNS], *([n, *(c[k] for k in COLUMNS)] for n, c in found.items())]))
    # It imports this module.
    from serving import resume_time

    times = resume_time.measure()
    report.write("resume", found | {"time": times}, targets(found) + resume_time.targets(times))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for load, kind, pool in cells(sys.argv[1]):
            counts = serve(sys.argv[2], ENGINES[sys.argv[1]], load, pool)
            print("RESULT", json.dumps([f"{load}, {kind} pool, {sys.argv[1]}", counts]), flush=True)
    else:
        main()
