"""One vLLM engine in a process of its own; tells one result for each cell.

Its task: {"model": PATH, "eviction": {...} or null, "kind": "decode", "steps": 24, "cells": [[8192, 32]]}

"decode": seconds of a decode step with every sequence decoding, the mean over a cycle of evictions ("cycle": steps from one to
the next). Contexts of up to 32K cannot be read for real on two cores, so steps that read prompts skip the model and the cache is
filled with random numbers beforehand: vLLM's scheduler, pages, block tables and every decode step are real, tokens are
meaningless (random weights: they are anyway).
"ttft": seconds to the first token of one sequence, everything real.
"tokens": what each of several sequences says, past an eviction.
"pool": in a pool of POOL_TOKENS, how many of many equal requests run at a time, and how many are preempted; prompts as above.
"""

import statistics
import time
from typing import Any

import child
from serving import engine
from serving.model import POOL_NEW, POOL_PROMPT, POOL_REQUESTS, POOL_TOKENS

CHUNK = {"decode": 8192, "ttft": 2048, "pool": 512, "tokens": 2048}


class Engine:
    """vLLM's engine, stepped by hand."""

    def __init__(self, model: str, eviction: dict | None, max_num_seqs: int, chunk: int, **extra: Any) -> None:
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": chunk}
        self.llm = engine.start(model, eviction, enable_prefix_caching=False, **limits, **extra)
        self.number = 0

    @property
    def pool_tokens(self) -> int:
        cache = self.llm.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def fake_prefill(self) -> None:
        """Fill the cache with random numbers and skip the model in every step that is not pure decode."""
        runner = self.llm.model_executor.driver_worker.worker.model_runner
        for cache in runner.kv_caches:
            cache.normal_()
        forward = runner.model.forward

        def decode_only(input_ids, positions, *args, **kwargs):
            if len(positions) > runner.max_num_reqs:  # a prompt chunk is in it
                return runner.model.model.embed_tokens(input_ids)
            return forward(input_ids, positions, *args, **kwargs)

        runner.model.forward = decode_only

    def add(self, context: int, new_tokens: int) -> None:
        prompt = [(7 * i + self.number) % 8000 for i in range(context)]
        engine.add(self.llm, str(self.number), prompt, new_tokens)
        self.number += 1

    def decode_seconds(self, context: int, batch: int, steps: int, cycle: int) -> float:
        """Seconds of a step in which all `batch` sequences decode: mean over the `cycle` steps from one eviction to the next,
        of each one's median over the cycles measured. Sequences of one length observe and evict in the same steps."""
        self.finish()
        for _ in range(batch):
            self.add(context, 4096)
        decoding: set[str] = set()
        while len(decoding) < batch:
            decoding |= {o.request_id for o in self.llm.step() if o.outputs[0].token_ids}
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            outputs = self.llm.step()
            times.append(time.perf_counter() - start)
            assert len(outputs) == batch, "a sequence was preempted: the pool is too small for this cell"
        return statistics.mean(statistics.median(times[i::cycle]) for i in range(cycle))

    def ttft_seconds(self, context: int) -> float:
        self.finish()
        self.add(context, 1)
        start = time.perf_counter()
        self.finish(abort=False)
        return time.perf_counter() - start

    def tokens(self, context: int, batch: int) -> list[list[int]]:
        for i in range(batch):
            self.add(context + 7 * i, 64)
        said: dict[str, list[int]] = {}
        while self.llm.has_unfinished_requests():
            said |= {o.request_id: list(o.outputs[0].token_ids) for o in self.llm.step() if o.finished}
        return [said[name] for name in sorted(said, key=int)]

    def finish(self, abort: bool = True) -> None:
        if abort:
            self.llm.abort_request([str(n) for n in range(self.number)])
        while self.llm.has_unfinished_requests():
            self.llm.step()


def measure_pool(served: Engine) -> dict[str, float]:
    """Sequences running at a time while others wait, and preemptions."""
    scheduler = served.llm.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []
    scheduler._preempt_request = lambda request, *args: (preempted.append(request), preempt(request, *args))[1]
    for _ in range(POOL_REQUESTS):
        served.add(POOL_PROMPT, POOL_NEW)
    running = []
    while served.llm.has_unfinished_requests():
        served.llm.step()
        if scheduler.waiting:
            running.append(len(scheduler.running))
    return {"running": statistics.mean(running[len(running) // 4 :]), "preemptions": len(preempted)}


def main(task: dict) -> None:
    kind, cells = task["kind"], task.get("cells", [])
    graphs = task.get("compilation")
    extra: dict[str, Any] = {"compilation_config": graphs, "enforce_eager": False} if graphs else {}
    if kind == "pool":
        extra["num_gpu_blocks_override"] = POOL_TOKENS // task["page_size"] + 1  # and the null page
        extra |= {"block_size": task["page_size"], "max_model_len": POOL_PROMPT + POOL_NEW}
    seqs = 64 if kind == "pool" else max(batch for _, batch in cells)
    served = Engine(task["model"], task["eviction"], seqs, CHUNK[kind], **extra)
    if kind in ("decode", "pool") and task.get("fake_prefill", True):
        served.fake_prefill()
    if kind == "pool":
        child.tell(measure_pool(served))
    for context, batch in cells:
        if kind == "tokens":
            child.tell({"tokens": served.tokens(context, batch)})
            continue
        if kind == "decode":
            seconds = served.decode_seconds(context, batch, task["steps"], task.get("cycle", 1))
        else:
            served.ttft_seconds(256)
            seconds = served.ttft_seconds(context)
        child.tell({"context": context, "batch": batch, "seconds": seconds, "pool_tokens": served.pool_tokens})


if __name__ == "__main__":
    main(child.task())
