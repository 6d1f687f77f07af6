"""The decode step's lists that the device makes are the ones that the host would make, step by step over whole lives."""

import os

import pytest
import torch

from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.attention.step_plan_on_device import DecodePlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.page_schedule import PageSchedule, build_schedule, cdiv
from momentkv_vllm.policies import find

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")


@needs_interpreter
@pytest.mark.parametrize("policy", ["momentkv", "h2o", "streamingllm"])
@pytest.mark.parametrize(("budget", "moment_pages", "retire"), [(128, 3, None), (160, 1, 32)])
def test_the_device_plans_what_the_host_plans(policy, budget, moment_pages, retire):
    config = EvictionConfig.from_dict({"policy": policy, "budget_tokens": budget, "retire_tokens": retire})
    check_schedule(config, build_schedule(config, 16, moment_pages, find(policy).keeps_only_sinks))


@needs_interpreter
@pytest.mark.parametrize(
    ("policy", "correction", "run", "heads"),
    [
        *((policy, *kind, "equal") for policy in ("momentkv", "h2o") for kind in (("zeroth", 8), ("first", 1))),
        ("momentkv", "zeroth", 8, "measured"),
    ],
)
def test_the_device_plans_what_the_host_plans_for_quantised_stores(policy, correction, run, heads):
    """The record in the last store page, and in pages of its own; events that evict nothing, and such that do; heads that evict
    before the store is full."""
    settings = {
        "policy": policy,
        "budget_tokens": 192,
        "correction": correction,
        "store_dtype": "int4",
        "run_tokens": run,
        "head_budgets": heads,
    }
    config = EvictionConfig.from_dict(settings)
    schedule = StateLayout.of(config, 16, 64, torch.bfloat16).schedule
    assert schedule.is_packed and schedule.record_in_store == (correction == "zeroth")
    assert (schedule.equal_tokens > 0) == (heads == "measured")
    check_schedule(config, schedule)


@needs_interpreter
@pytest.mark.parametrize("store", ["model", "int4"])
def test_the_device_plans_what_the_host_plans_for_prompts_with_a_grain_of_their_own(store):
    """Single tokens of prompts that are read, a prompt's last one among them."""
    settings = {"policy": "momentkv", "budget_tokens": 192, "store_dtype": store, "retire_tokens": 16}
    config = EvictionConfig.from_dict(settings | {"prefill_retire_tokens": 64})
    schedule = StateLayout.of(config, 16, 64, torch.bfloat16).schedule
    assert schedule.prefill_retire_pages == 4 * schedule.retire_pages
    check_schedule(config, schedule)
    for prompt in (0, 100, 192, 199, 300, 317, 1000):
        check_schedule(config, schedule, prompt)


def check_schedule(config: EvictionConfig, schedule: PageSchedule, prompt: int = 0):
    """prompt: length of every row's."""
    policy = config.policy
    host = StepPlanner([schedule], config, find(policy))
    planner = DecodePlanner(schedule, config, find(policy), 8, "cpu")
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(1, 10_000, (6, 40), generator=generator, dtype=torch.int32)
    places = places_of(planner.attend)
    query_start = torch.tensor([0, 1, 2, 3, 3, 4, 5], dtype=torch.int32)  # row 3 is padding
    events = 0
    period = schedule.retire_tokens
    prompts = torch.full((6,), prompt, dtype=torch.int32)
    for step in (0, 1, 2, 3, period + 1, period + 2, period + 3, 2 * period + 2):
        edge = schedule.first_event_tokens - 2
        # The last row is about to fill the store: 40 tokens on, unless it holds more.
        full = edge + cdiv(max(0, schedule.store_tokens - edge), period) * period
        lens = [1 + step, edge + step, edge + 7 + step, 0, edge + 40 + step, full + step]
        made = planner.update(torch.tensor(lens, dtype=torch.int32), query_start, table, prompts).rounds[0]
        attend, retire_work = made.attends[0], made.retires[0]
        assert places_of(attend) == {name: places[name] for name in places_of(attend)}
        assert attend.num_queries.tolist() == [1, 1, 1, 0, 1, 1] and (retire_work.retiring_pages[3] == -1).all()
        due = [row for row in range(6) if (retire_work.retiring_pages[row] >= 0).any()]
        assert retire_work.due[: 1 + len(due)].tolist() == [len(due), *due]
        events += int((retire_work.retiring_pages >= 0).any(1).sum())
        for row in (0, 1, 2, 4, 5):
            check_row(host, attend, retire_work, row, int(query_start[row]), lens[row], table, prompt)
    assert events >= (3 if prompt <= schedule.first_event_tokens else 1)


def places_of(work):
    return {name: x.data_ptr() for name, x in vars(work).items() if isinstance(x, torch.Tensor)}


def check_row(host, attend, retire, row, token, end, table, prompt):
    segment = next(host._segments(row, token, end - 1, end, prompt, 0))
    want = host._attend([segment], table.numpy())
    pages = want.pages.shape[1]
    assert attend.pages[row, :pages].tolist() == want.pages[0].tolist() and not attend.pages[row, pages:].any()
    for name in ("first_token", "num_queries", "last_slot", "num_evicted"):
        assert getattr(attend, name)[row] == getattr(want, name)[0], (name, row, end)
    assert attend.store_pages == want.store_pages
    if want.stored is not None:
        assert attend.stored[row] == retire.stored[row] == want.stored[0], (row, end)
    if want.num_evicted[0] > 0:
        assert attend.moment_pages[row].tolist() == want.moment_pages[0].tolist()
    if host.observe:
        assert attend.observe_from[row] == want.observe_from[0] and attend.restart[row] == want.restart[0], (row, end)
    retired = [p for p in retire.retiring_pages[row].tolist() if p >= 0]
    if not segment.retire_to:
        assert retired == []
        return
    due = host._retire([segment], table.numpy())
    assert retired == due.retiring_pages[0].tolist()
    assert retire.store_pages[row].tolist() == due.store_pages[0].tolist()
    assert retire.moment_pages[row].tolist() == due.moment_pages[0].tolist()
    assert retire.num_evicted[row] == due.num_evicted[0]
    assert (retire.run_tokens, retire.store_tokens) == (due.run_tokens, due.store_tokens)
