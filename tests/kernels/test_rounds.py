"""Rounds in one call give what they give one by one, bit by bit."""

import pytest
import torch

from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import shared
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.kernels.worklists import Rounds
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.page_schedule import cdiv

HEADS, GROUPS, D, PAGE, BUDGET = 3, 2, 64, 16, 256
REACH = torch.tensor([[0.1, 0.9, 0.3]])
CPU = select("cpu")


class Layer:
    """One layer of two sequences: a prompt of `tokens` that is read in steps of `step`, and one that decodes beside it after its
    first step."""

    def __init__(self, config: EvictionConfig, dtype: torch.dtype, step: int, own: bool) -> None:
        self.step, self.layout = step, StateLayout.of(config, PAGE, D, dtype)
        self.schedule, self.policy = self.layout.schedule, config.policy_class()
        self.planner, self.config = StepPlanner([self.schedule], config, type(self.policy)), config
        generator = torch.Generator().manual_seed(3)
        pages = cdiv(self.tokens, PAGE) + 1
        self.table = (torch.randperm(2 * pages, generator=generator) + 1).view(2, pages).int()
        kv = torch.zeros(2 * pages + 1, HEADS, PAGE, 2 * D, dtype=dtype)
        self.cache = CacheView.of_vllm_cpu(kv, self.layout.record, self.layout.packed)
        self.observed = Observed.of(self.cache, "mass")
        if own:
            self.cache.heads = self._own_budgets()
        drawn = (torch.randn(2, self.tokens, n, D, generator=generator) for n in (HEADS * GROUPS, HEADS, HEADS))
        self.query, self.key, self.value = (x.to(dtype) for x in drawn)
        self.consolidations = 0

    @property
    def tokens(self) -> int:
        """Until long after the store is full."""
        return self.schedule.store_tokens + BUDGET + 300

    def _own_budgets(self):
        capacity = shared(REACH, self.schedule.store_tokens, self.schedule.run_tokens, longest=10_000)
        assert capacity.unique().numel() == HEADS
        given = capacity, self.schedule.store_tokens, self.schedule.equal_tokens
        return budgets_in([self.cache], [self.observed], *given)[0]

    def read(self, run) -> list[torch.Tensor]:
        """What every step gives; run: of a family."""
        outputs, longest, begins = [], 0, [0, 0]
        while begins[0] < self.tokens - self.step:
            ends = [begins[0] + self.step, begins[1] + 1 if begins[1] else self.tokens - 100]
            tokens = torch.cat([torch.arange(a, b) for a, b in zip(begins, ends, strict=True)])
            rows = torch.tensor([0, 1]).repeat_interleave(torch.tensor(ends) - torch.tensor(begins))
            slots = self.table[rows, tokens // PAGE].long() * PAGE + tokens % PAGE
            CPU.write(self.cache, self.key[rows, tokens], self.value[rows, tokens], slots, self.observed)
            starts = [0, self.step, len(tokens)]
            plan = self.planner.build(starts, ends, [self.tokens] * 2, self.table)
            query = self.query[rows, tokens]
            output = torch.zeros_like(query)
            work = Rounds(plan.rounds, lambda _: self.cache, self.config.correction)
            seconds = run(CPU, work, self.observed, query, output, self.policy, 4, D**-0.5)
            assert len(seconds) == len(work.retires) and all(s > 0 for s in seconds)
            outputs.append(output)
            longest, self.consolidations = max(longest, len(plan.rounds)), self.consolidations + len(seconds)
            begins = ends
        assert longest > 3
        return outputs


@pytest.fixture(params=[2, 5], ids=["heads go their own way", "more threads than heads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("store", "dtype", "settings"),
    [
        ("int4", torch.bfloat16, {"head_budgets": "measured"}),
        ("int4", torch.bfloat16, {}),
        ("int8", torch.float32, {"head_budgets": "measured", "prefill_retire_tokens": 64}),
        ("model", torch.bfloat16, {}),
        ("model", torch.float32, {"policy": "keydiff"}),
        ("model", torch.bfloat16, {"correction": "first"}),
    ],
)
def test_in_one_call_and_one_by_one(threads, store, dtype, settings):
    config = EvictionConfig(**{"policy": "momentkv", "budget_tokens": BUDGET, "store_dtype": store} | settings)
    together, apart = (Layer(config, dtype, 160, own="head_budgets" in settings) for _ in range(2))
    for _ in range(2):  # whichever thread was first
        got, want = together.read(type(CPU).run), apart.read(KernelFamily.run)
        for step, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(a, b), f"step {step}"
        assert torch.equal(together.cache.raw, apart.cache.raw)
        assert torch.equal(together.observed.mass, apart.observed.mass)
    assert together.consolidations > 20
