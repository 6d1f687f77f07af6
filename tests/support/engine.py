"""A real vLLM engine in this process, stepped by hand, with the block manager's books checked after every step."""

import contextlib
import functools
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_model_runner import _torch_cuda_wrapper

from momentkv_vllm.block_manager.manager import MomentKVManager
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels.cpu import Cpu
from momentkv_vllm.vllm_seams.engine_args import choose_scheduler

EVICTION_KEYS = tuple(f.name for f in fields(EvictionConfig))


def random_prompt(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{seed}-{tokens}")
    return [1] + [rng.randrange(4, 128) for _ in range(tokens - 1)]


def random_words(tokens: int, seed: int = 0) -> str:
    """The text of `random_prompt`, whose first token a server adds itself."""
    return " ".join(f"w{t - 4}" for t in random_prompt(tokens, seed)[1:])


# Every worker looks for Triton's kernels among all attributes of all modules, to put vLLM's own for CPUs in their place. The
# first one finds them; modules imported later import what stands there by then.
CpuPlatform.register_triton_kernel_overrides = staticmethod(
    functools.cache(CpuPlatform.register_triton_kernel_overrides)
)

# Where there is AMX, stock's attention in bfloat16 takes it, as ours does of prompts: both round otherwise than vectors and may say
# another token. Tests that compare tokens below the budget compare vectors, but for that of near ties.
torch.cpu._is_amx_tile_supported = lambda: False
attends_prompts = Cpu.attends_prompts
Cpu.attends_prompts = lambda self, shape: False


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """vLLM collects garbage eight times in an engine's life, a quarter of a second each among the modules of many models, and
    brings to the collector's eyes at the end what `Engine` has hidden from them."""
    calls = {"collect": lambda generation=2: 0, "freeze": lambda: None, "unfreeze": lambda: None}
    own = {name: getattr(gc, name) for name in calls}
    try:
        vars(gc).update(calls)
        yield
    finally:
        vars(gc).update(own)


class Engine:
    """vLLM's LLMEngine. Eviction keys go to additional_config, everything else to EngineArgs.

    Stores are of the model's dtype unless a test says: a page of these tiny float32 models holds three pages' tokens in int8, and
    little would be evicted. Keys are rounded by themselves likewise: where they are not, the last bit of one number decides about
    all codes of its key, and answers that are compared may differ at a near tie.

    pipelined: schedule every step before the last one's output is in. vLLM's CPU platform sets async_scheduling to False whatever
    the user says, so it is set behind its back; the worker then needs vLLM's own stand-ins for CUDA streams and events.
    """

    alive = 0

    def __init__(self, model: Path, pipelined: bool = False, **options: Any) -> None:
        eviction = {k: options.pop(k) for k in EVICTION_KEYS if k in options}
        defaults = {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 256,
            "num_gpu_blocks_override": 400, "enable_prefix_caching": False,
        }  # fmt: skip
        if eviction:
            eviction = {"store_dtype": "model", "key_rounding": "nearest"} | eviction
            defaults["additional_config"] = {"kv_eviction": eviction}
        config = EngineArgs(model=str(model), **{**defaults, **options}).create_engine_config()
        self._streams = contextlib.ExitStack()
        if pipelined:
            config.scheduler_config.async_scheduling = True
            config.scheduler_config.scheduler_cls = None
            if eviction:
                choose_scheduler(config)
            self._streams.enter_context(_torch_cuda_wrapper())
        if not Engine.alive:
            gc.freeze()  # what is older than all engines (modules, mostly) is no garbage: not looked through at their ends
        with garbage_left_alone():
            self.vllm = LLMEngine.from_vllm_config(config)
        Engine.alive += 1
        self.scheduler = self.vllm.engine_core.engine_core.scheduler
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.manager = next((m for m in managers if isinstance(m, MomentKVManager)), managers[0])
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()
        self.peak_pages: dict[str, int] = {}
        self.cached_tokens: dict[str, int] = {}
        self.preemptions = 0
        self._next = 0
        self._count_preemptions()

    def add(self, prompt: list[int] | dict[str, Any], max_tokens: int = 32, **sampling: Any) -> str:
        """prompt: token ids, or a prompt of vLLM's with text and sounds or images."""
        name = f"r{self._next}"
        self._next += 1
        settings = {"temperature": 0.0, "ignore_eos": True, **sampling}
        given = prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
        self.vllm.add_request(name, given, SamplingParams(max_tokens=max_tokens, **settings))
        return name

    def step(self) -> list:
        """One engine step; the books must balance after it."""
        outputs = self.vllm.step()
        if hasattr(self.manager, "check_integrity"):
            self.manager.check_integrity(self._pages_of_other_groups(), self.scheduler.requests)
        for name, blocks in self.manager.req_to_blocks.items():
            live = sum(not b.is_null for b in blocks)
            # vLLM appends a random suffix to internal request ids.
            self.peak_pages[name.split("-")[0]] = max(live, self.peak_pages.get(name.split("-")[0], 0))
        return outputs

    def _pages_of_other_groups(self) -> int:
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        tables = [blocks for m in managers if m is not self.manager for blocks in m.req_to_blocks.values()]
        return len({b.block_id for blocks in tables for b in blocks if not b.is_null})

    def run(self, on_step: Callable[[int], None] | None = None) -> dict[str, list[int]]:
        """Step until nothing is left; tokens of every finished request. `on_step(number)` may add or abort requests."""
        tokens: dict[str, list[int]] = {}
        number = 0
        while self.vllm.has_unfinished_requests():
            for output in self.step():
                if output.finished:
                    self.cached_tokens[output.request_id] = output.num_cached_tokens
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            if on_step:
                on_step(number)
            number += 1
        return tokens

    def generate(
        self, prompts: list[list[int] | dict[str, Any]], max_tokens: int = 32, **sampling: Any
    ) -> list[list[int]]:
        names = [self.add(p, max_tokens, **sampling) for p in prompts]
        tokens = self.run()
        return [tokens[n] for n in names]

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args, **kwargs):
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def abort(self, name: str) -> None:
        self.vllm.abort_request([name])

    def close(self) -> None:
        assert self.pool.get_num_free_blocks() == self.free_at_start, "an idle engine must own no pages"
        with garbage_left_alone():
            self.vllm.engine_core.shutdown()
        self._streams.close()
        # Otherwise the next engine inherits process groups made for this one's model (none for experts, say).
        destroy_model_parallel()
        destroy_distributed_environment()
        del self.vllm, self.scheduler, self.manager, self.pool
        Engine.alive -= 1
        gc.collect()
