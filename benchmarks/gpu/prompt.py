"""A prompt read by one layer, as a server reads it: in steps of STEP tokens, all events in them, planned on the host."""

import time
from typing import Any

import baselines
import graph
import torch
from graph import PAGE, POLICY, STORES
from shape import SINKS, Shape

from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import Round, Rounds, mapped
from momentkv_vllm.page_schedule import cdiv

STEP, REPEATS = 8192, 3


class Reader:
    """A layer of `heads` KV heads that reads one prompt of `tokens` random tokens."""

    def __init__(self, family, device: str, store: str, grain: int, tokens: int, size: dict[str, int]) -> None:
        self.family, self.device, self.tokens = family, device, tokens
        heads, groups, d, budget = (size[k] for k in ("heads", "groups", "d", "budget"))
        config, self.schedule, record, packed = graph.laid_out(store, budget, d, grain)
        widest = self.schedule.most_retired_pages
        self.planner = StepPlanner([self.schedule], config, POLICY, 1 << 62, widest)
        own = self.schedule.reading_pages + min(tokens, STEP) // PAGE + 2
        generator = torch.Generator(device).manual_seed(5)
        self.table = graph.dealt(1, cdiv(tokens, PAGE) + 1, self.schedule.store_pages, own, generator)
        kv = torch.zeros(own + 1, heads, PAGE, 2 * d, dtype=torch.bfloat16, device=device)
        self.cache = CacheView.of_vllm_gpu(kv, record, packed)
        self.mass, self.policy, self.scale = Observed.of(self.cache, "mass"), POLICY(), d**-0.5
        shapes = (heads * groups, heads, heads)
        drawn = (torch.randn(min(tokens, STEP), n, d, generator=generator, device=device) for n in shapes)
        self.query, self.key, self.value = (x.bfloat16() for x in drawn)
        self.output = torch.zeros_like(self.query)

    def plan(self, begin: int, end: int) -> tuple[list[Round], torch.Tensor]:
        """A step's lists and the slots of its tokens, on the device."""
        step = self.planner.build([0, end - begin], [end], [self.tokens], self.table.cpu())
        rounds = [Round(*([self._there(w) for w in works] for works in (r.attends, r.retires))) for r in step.rounds]
        position = torch.arange(begin, end, device=self.device)
        return rounds, self.table[0].long()[position // PAGE] * PAGE + position % PAGE

    def _there(self, work: Any) -> Any:
        return mapped(work, lambda _, x: x.to(self.device))

    def step(self, rounds: list[Round], slots: torch.Tensor) -> None:
        """As EvictingImpl.forward."""
        n = len(slots)
        query, key, value = self.query[:n], self.key[:n], self.value[:n]
        self.family.write(self.cache, key, value, slots, self.mass)
        work = Rounds(rounds, lambda _: self.cache, "first")
        self.family.run(work, self.mass, query, self.output[:n], self.policy, SINKS, self.scale)

    def steps(self) -> list[tuple[list[Round], torch.Tensor]]:
        return [self.plan(a, min(a + STEP, self.tokens)) for a in range(0, self.tokens, STEP)]


def life(family, device: str, store: str, grain: int, size: dict[str, int]) -> dict[str, Any]:
    """A prompt across events of both grains, until the store is full and evicts, beside the reference: the outputs agree."""
    schedule = graph.laid_out(store, size["budget"], size["d"], grain)[1]
    tokens = schedule.store_tokens + size["budget"] + 2 * grain + 5
    ours, want = (Reader(f, device, store, grain, tokens, size) for f in (family, select("reference")))
    for rounds, slots in ours.steps():
        ours.step(rounds, slots), want.step(rounds, slots)
    got, right = (x.output[: len(slots)].float() for x in (ours, want))
    error = ((got - right).norm() / right.norm()).item()
    assert error <= STORES[store][2], f"{family.name}, {store}, grain {grain}: outputs differ by {error:.2e}"
    events = len(list(schedule.events(0, tokens, tokens)))
    evicted = schedule.evicted_tokens(schedule.boundary_column(tokens, tokens))
    assert evicted > 0, "nothing was evicted"
    return {"store": store, "grain": grain, "events": events, "evicted": evicted, "worst_relative_difference": error}


def timed(
    family, device: str, store: str, grain: int, tokens: int, size: dict[str, int], fed_back: bool = False
) -> dict[str, Any]:
    """Seconds of the layer's attention over a prompt, launches from Python included, beside causal attention over it. fed_back:
    errors in keys are."""
    reader = Reader(family, device, store, grain, tokens, size)
    reader.cache.feedback = graph.feedback_for(reader.cache) if fed_back else None
    start = time.perf_counter()
    steps = reader.steps()
    planned = time.perf_counter() - start

    def read() -> None:
        for rounds, slots in steps:
            reader.step(rounds, slots)

    stock = Shape(kv_heads=size["heads"], groups=size["groups"], head_dim=size["d"])
    host, all_ours = _wall(read, device)
    _, causal = _wall(baselines.causal(tokens, stock, device), device)
    row = {"family": family.name, "store": store, "grain": grain, "prompt": tokens, "fed_back": fed_back}
    row |= {"rounds": sum(len(rounds) for rounds, _ in steps), "plan_us": planned * 1e6, "host_us": host * 1e6}
    return row | {"layer_us": all_ours * 1e6, "causal_us": causal * 1e6, "to_causal": all_ours / causal}


def _wall(call, device: str) -> tuple[float, float]:
    """(seconds until the last launch returned, seconds until all was done), each the least of REPEATS."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()  # compiles
    times = []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        wait()
        times.append((launched, time.perf_counter() - start))
    return min(t[0] for t in times), min(t[1] for t in times)
