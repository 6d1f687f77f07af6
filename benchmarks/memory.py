"""Where the memory of a CPU worker grows: one engine, random requests, the C library's own books after every batch.

Stock vLLM and momentkv, each with oneDNN's default of 1,024 kept primitives and with PRIMITIVES. oneDNN compiles a matrix product
for every number of tokens in a step and every weight's shape, and keeps it; what grows with work done and ends is that cache.
"""

import concurrent.futures
import ctypes
import os
import random
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import child
import psutil
import report
from benchmark import Benchmark
from tqdm import tqdm

MODEL = Path(__file__).parent / "test_model/checkpoint"
VARIABLE, PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 64
BATCHES, REQUESTS = 80, 24
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 12,
}
EVICTION = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256}}
ENGINES = {
    "momentkv": {"additional_config": EVICTION, "num_gpu_blocks_override": 81},
    "stock": {"num_gpu_blocks_override": 257},
}


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2, in bytes; `uordblks` is in use and `fordblks` free, in all arenas."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def sample(libc: ctypes.CDLL) -> dict[str, float]:
    """MiB: resident; allocated and not freed; freed and kept by the C library."""
    heap = libc.mallinfo2()
    held = {"resident": psutil.Process().memory_info().rss, "allocated": heap.uordblks, "kept_free": heap.fordblks}
    return {name: size / 2**20 for name, size in held.items()}


def serve(engine: str) -> list[dict[str, float]]:
    """One engine in this process; a sample and the batch's seconds after every batch."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo2
    llm = LLM(str(MODEL), disable_log_stats=True, **OPTIONS, **ENGINES[engine])
    chosen, samples = random.Random(0), []
    for _ in range(BATCHES):
        prompts = [
            {"prompt_token_ids": [1, *(chosen.randrange(20, 700) for _ in range(chosen.randrange(20, 1000)))]}
            for _ in range(REQUESTS)
        ]
        lengths = [SamplingParams(temperature=0, max_tokens=chosen.randrange(8, 200), ignore_eos=True) for _ in prompts]
        begin = time.monotonic()
        llm.generate(prompts, lengths, use_tqdm=False)
        samples.append({"seconds": time.monotonic() - begin} | sample(libc))
    return samples


def cell(engine: str, primitives: int | None, core: int) -> dict[str, Any]:
    """The samples of one engine in a process of its own, on one core; primitives None leaves oneDNN's default."""
    settings = {"OMP_NUM_THREADS": "1"} | ({VARIABLE: str(primitives)} if primitives else {})
    (samples,) = child.results("memory", {"engine": engine}, ("taskset", "-c", str(core)), **settings)
    half = samples[len(samples) // 2 :]
    return {
        "engine": engine,
        "primitives": primitives or "default",
        "growth_of_second_half": half[-1]["resident"] / half[0]["resident"] - 1,
        "seconds_a_batch": statistics.median(s["seconds"] for s in half),
        "samples": {name: [round(s[name], 1) for s in samples] for name in samples[0]},
    }


def measure(_: Namespace) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    os.environ.pop(VARIABLE, None)
    with concurrent.futures.ThreadPoolExecutor() as threads, tqdm(total=2 * len(ENGINES), desc="engines") as bar:
        for primitives in (None, PRIMITIVES):
            for found in threads.map(cell, ENGINES, [primitives] * 2, range(2)):
                cells.append(found)
                bar.update()
    return cells


def tables(cells: list[dict[str, Any]]) -> list[list[list]]:
    columns = ("resident", "allocated", "kept_free")
    heading = ["engine", "primitives", *(f"{c}, first to last MiB" for c in columns)]
    rows = [[*heading, "growth of second half", "s per batch"]]
    for c in cells:
        spans = [f"{c['samples'][name][0]:.0f} to {c['samples'][name][-1]:.0f}" for name in columns]
        rows.append([c["engine"], c["primitives"], *spans, c["growth_of_second_half"], c["seconds_a_batch"]])
    return [rows]


def targets(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    limited = next(c for c in cells if c["engine"] == "momentkv" and c["primitives"] == PRIMITIVES)
    return [report.target("growth with few primitives", limited["growth_of_second_half"], 0.02, at_least=False)]


def draw(cells: list[dict[str, Any]], axes: Any) -> None:
    for c in cells:
        axes.plot(c["samples"]["resident"], label=f"{c['engine']}, {c['primitives']} products kept")
    axes.set(xlabel="batch", ylabel="resident memory (MiB)")
    axes.legend(fontsize=8)


BENCHMARK = Benchmark("memory", measure, tables, targets, draw, size=(6, 4))

if __name__ == "__main__":
    if task := child.task():
        child.tell(serve(task["engine"]))
    else:
        BENCHMARK.run()
