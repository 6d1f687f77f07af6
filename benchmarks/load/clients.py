"""Two load generators that know nothing of each other, and one form of their results.

A result: rate (requests/s asked for), completed, failed, requests_per_second, output_tokens_per_second, and median and 99th
percentile of ttft (ms to the first token, queueing included) and tpot (ms a token after it).
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import environments
import numpy as np
from load.model import NEW_TOKENS, PROMPT_TOKENS


def run(command: list[str], folder: Path) -> None:
    """Below the server's priority: on two cores the clients are not to slow what they measure. Raises SystemExit."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["nice", "-n", "5", *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")


def vllm_bench(url: str, model: Path, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """`vllm bench serve`: `rate * seconds` requests, Poisson arrivals, until all are answered."""
    result = folder / "vllm_bench.json"
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", url]
    command += ["--model", "load", "--tokenizer", str(model), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(NEW_TOKENS), "--disable-tqdm"]
    command += ["--num-prompts", str(round(rate * seconds)), "--request-rate", str(rate), "--seed", "0"]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99", "--temperature", "0"]
    run([*command, "--save-result", "--result-filename", str(result)], folder)
    found = json.loads(result.read_text())
    return {
        "rate": rate,
        "completed": found["completed"],
        "failed": found["failed"],
        "requests_per_second": found["request_throughput"],
        "output_tokens_per_second": found["output_throughput"],
        "ttft_median": found["median_ttft_ms"],
        "ttft_p99": found["p99_ttft_ms"],
        "tpot_median": found["median_tpot_ms"],
        "tpot_p99": found["p99_tpot_ms"],
    }


def guidellm(url: str, model: Path, prompts: Path, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """GuideLLM: `rate * seconds` requests at even distances (0.8.1's Poisson arrivals lose their start time on a busy machine and
    come all at once), until all are answered. Its summary weighs by tokens, so the figures are taken from its requests."""
    result = folder / "guidellm.json"
    command = [
        str(environments.programs("guidellm") / "guidellm"),
        "run",
        "--disable-console",
        "--seed",
        "kind=static,value=0",
    ]
    command += ["--backend", f"kind=openai_http,target={url},model=load,request_format=/v1/completions"]
    command += [
        "--profile",
        f"kind=constant,rate={rate}",
        "--constraint",
        f"kind=max_requests,count={round(rate * seconds)}",
    ]
    command += ["--tokenizer", f"kind=huggingface_auto,model={model}", "--data", f"kind=json_file,path={prompts}"]
    run([*command, "--output", f"kind=json,path={result}"], folder)
    (found,) = json.loads(result.read_text())["benchmarks"]
    done = found["requests"]["successful"]
    first = [r["time_to_first_token_ms"] for r in done]
    later = [r["inter_token_latency_ms"] for r in done]
    totals = found["metrics"]["request_totals"]
    return {
        "rate": rate,
        "completed": len(done),
        "failed": totals["errored"] + totals["incomplete"],
        "requests_per_second": len(done) / found["duration"],
        "output_tokens_per_second": sum(r["output_tokens"] for r in done) / found["duration"],
        "ttft_median": statistics.median(first),
        "ttft_p99": float(np.percentile(first, 99)),
        "tpot_median": statistics.median(later),
        "tpot_p99": float(np.percentile(later, 99)),
    }
