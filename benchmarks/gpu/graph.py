"""CUDA-graph replay against eager: a decode layer over whole retiring periods, one graph for steps with and without events."""

import torch
from shape import SINKS

from momentkv_vllm.attention.step_plan_on_device import DecodePlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.page_schedule import build_schedule
from momentkv_vllm.policies import find

POLICY = find("momentkv")


class Layer:
    """A decode layer of `rows` sequences with persistent inputs, as the engine's graph sees them."""

    def __init__(self, family, device: str, rows: int, heads: int, groups: int, d: int, budget: int) -> None:
        self.family, self.device, self.rows, self.d = family, device, rows, d
        config = EvictionConfig(policy="momentkv", budget_tokens=budget, correction="first")
        record = RecordLayout(d)
        self.schedule = build_schedule(config, 16, record.pages(16, 2), False)
        self.planner = DecodePlanner(self.schedule, config, POLICY, rows, device)
        columns = 3 * self.schedule.budget_pages
        generator = torch.Generator(device).manual_seed(3)
        self.table = (torch.randperm(rows * columns, generator=generator, device=device) + 1).view(rows, -1).int()
        shape = (rows * columns + 1, heads, 16, 2 * d)
        kv = torch.randn(shape, generator=generator, device=device).bfloat16()
        self.cache, self.mass = CacheView.of_vllm_gpu(kv, record), Observed(torch.zeros(shape[:3], device=device))
        self.query = torch.zeros(rows, heads * groups, d, dtype=torch.bfloat16, device=device)
        self.key, self.value = (torch.zeros(rows, heads, d, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.output, self.slots = torch.zeros_like(self.query), torch.zeros(rows, dtype=torch.int64, device=device)
        self.query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.policy, self.scale = POLICY(), d**-0.5

    def prepare(self, step: int) -> None:
        """Inputs of a step; row i is i tokens ahead, so that rows retire in different steps."""
        ahead = torch.arange(self.rows, device=self.device)
        lens = self.schedule.first_event_tokens - 4 + step + ahead
        generator = torch.Generator(self.device).manual_seed(step)
        for x in (self.query, self.key, self.value):
            x.copy_(torch.randn(x.shape, generator=generator, device=self.device))
        position = lens - 1
        page = self.table.long().gather(1, (position // 16).unsqueeze(1)).squeeze(1)
        self.slots.copy_(page * 16 + position % 16)
        self.work = self.planner.update(lens.int(), self.query_start, self.table).rounds[0]

    def forward(self) -> None:
        attend, retire = self.work.attends[0], self.work.retires[0]
        self.family.write(self.cache, self.key, self.value, self.slots, self.mass)
        lse = torch.empty(self.query.shape[:2], device=self.device)
        self.family.attend(self.cache, self.query, self.output, lse, attend, self.scale, True)
        self.family.observe(self.cache, self.mass, self.query, lse, attend, self.scale)
        self.family.consolidate(self.cache, self.mass, retire, self.policy, SINKS, self.scale)


def run(family, device: str, tiny: bool) -> dict:
    """Steps over two retiring periods, eager and (on a GPU) replayed: outputs and caches must be the same bits."""
    sizes = (2, 1, 2, 32, 128) if tiny else (32, 8, 4, 128, 1024)
    eager, replayed = Layer(family, device, *sizes), Layer(family, device, *sizes)
    replayed.prepare(0)
    kv = replayed.cache.kv.clone()
    replayed.forward()  # compiles
    graph = None
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed.forward()
    replayed.cache.kv.copy_(kv)
    replayed.mass.data.zero_()
    steps = 6 if tiny else 2 * eager.schedule.retire_tokens + 40
    retired = 0
    for step in range(steps):
        for layer, go in ((eager, eager.forward), (replayed, graph.replay if graph else replayed.forward)):
            layer.prepare(step)
            go()
        retired += int((eager.work.retires[0].retiring_pages >= 0).sum())
        assert torch.equal(eager.output, replayed.output), f"step {step}: replay differs from eager"
    same = torch.equal(eager.cache.kv.view(torch.uint8), replayed.cache.kv.view(torch.uint8))
    assert same and retired > 0, "replay left another cache, or nothing retired"
    return {"steps": steps, "retired_pages": retired, "equal": True, "captured": graph is not None}
