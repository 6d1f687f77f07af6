"""What the host plans for a step: attention is observed where an event will need it, and nowhere else."""

from dataclasses import replace

import pytest
import torch

from momentkv_vllm.attention.sharing import SharingPlanner
from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout, schedules_of

PAGE, TOKENS, LAST = 16, 900, 8
TABLE = torch.arange(1, 1 + TOKENS // PAGE + 1)[None]


def planned(policy, store_dtype):
    """(for every token whether its attention is observed, the schedule) of a sequence that is decoded from the first one on."""
    values = {"policy": policy, "budget_tokens": 256, "store_dtype": store_dtype, "observation_tokens": LAST}
    config = EvictionConfig.from_dict(values)
    schedule = StateLayout.of(config, PAGE, 64, torch.bfloat16).schedule
    planner, observed = StepPlanner([schedule], config, config.policy_class), []
    for end in range(1, TOKENS + 1):
        rounds = planner.build([0, 1], [end], [0], TABLE).rounds
        observed.append(any(w.observe_from is not None for r in rounds for w in r.attends))
    return observed, schedule


@pytest.mark.parametrize("store_dtype", ["model", "int4"])
def test_the_last_queries_before_an_event_that_evicts_are_observed(store_dtype):
    observed, schedule = planned("momentkv", store_dtype)
    events = [e for e in schedule.events(0, TOKENS + LAST) if schedule.evicted_tokens(schedule.boundary_column(e))]
    assert (events[0] > schedule.first_event_tokens) == (store_dtype == "int4"), "a quantised store has room at first"
    assert observed == [any(e - LAST <= t < e for e in events) for t in range(TOKENS)]


@pytest.mark.parametrize("store_dtype", ["model", "int4"])
def test_a_policy_of_all_queries_sees_every_one(store_dtype):
    assert all(planned("h2o", store_dtype)[0])


@pytest.mark.parametrize(("grain", "events"), [(None, 225), (256, 29), (512, 15)])
def test_one_attend_and_one_consolidation_for_each_event_of_a_prompt(grain, events):
    """8,192 tokens in steps of 2,048 at a budget of 1,024: the first event there, then one every 32 tokens, or every `grain`."""
    config = EvictionConfig("momentkv", 1024, prefill_retire_tokens=grain)
    schedule = StateLayout.of(config, PAGE, 128, torch.bfloat16).schedule
    planner, prompt, step = StepPlanner([schedule], config, config.policy_class), 8192, 2048
    table = torch.arange(1, 1 + prompt // PAGE)[None]
    rounds = [
        r for end in range(step, prompt + 1, step) for r in planner.build([0, step], [end], [prompt], table).rounds
    ]
    assert sum(len(r.retires) for r in rounds) == events
    # The first 1,024 tokens are two segments of 512.
    assert [len(r.attends) for r in rounds] == [1] * (events + 1)


@pytest.mark.parametrize("store_dtype", ["model", "int4"])
def test_a_step_of_several_classes_is_the_steps_of_each(store_dtype):
    """Rows of three classes in one step; every work list is one that a step of that class alone has, with its number."""
    values = {"policy": "momentkv", "budgets": {"a": 256, "b": 512, "c": "off"}, "store_dtype": store_dtype}
    config = EvictionConfig.from_dict(values)
    schedules = schedules_of(config, PAGE, 64, torch.bfloat16, 4096)
    mixed = StepPlanner(schedules, config, config.policy_class)
    alone = [StepPlanner([s], config, config.policy_class) for s in schedules]
    lens, new = [3000, 3000, 3000, 1300, 1300, 1300], [1, 1, 1, 700, 700, 700]
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    table = torch.arange(1, 1 + len(lens) * 200).view(len(lens), 200)
    step = mixed.build(starts, lens, [0] * len(lens), table, [0, 1, 2, 0, 1, 2])
    assert step.stock_rows == [2, 5]
    found = [[], []]
    for number, planner in enumerate(alone[:2]):
        for row in (number, number + 3):
            # The other rows have no tokens, so that row and token numbers stay.
            own = [new[i] if i == row else 0 for i in range(len(lens))]
            begin = [starts[row] if i <= row else starts[row] + new[row] for i in range(len(lens) + 1)]
            parts = planner.build(begin, [n if k else 0 for n, k in zip(lens, own)], [0] * len(lens), table)
            for r in parts.rounds:
                found[0] += [described(replace(w, budget_class=number)) for w in r.attends]
                found[1] += [described(replace(w, budget_class=number)) for w in r.retires]
    assert sorted(described(w) for r in step.rounds for w in r.attends) == sorted(found[0])
    retired = [w for r in step.rounds for w in r.retires]
    assert sorted(described(w) for w in retired) == sorted(found[1]) and retired
    assert {w.store_pages.shape[1] for w in retired} == {s.store_pages for s in schedules[:2]}


def described(work) -> str:
    return str({key: x.tolist() if isinstance(x, torch.Tensor) else x for key, x in vars(work).items()})


@pytest.mark.parametrize(("end", "waits"), [(256 + 3 * PAGE, True), (256 + 3 * PAGE + 5, False)])
def test_layers_that_share_a_cache_attend_before_the_last_event(end, waits):
    """A step of one request over three events after the first: readers see the tokens after the third, or, where the step ends
    with an event, those before it, and that event waits for the last reader."""
    config = EvictionConfig.from_dict(
        {"policy": "momentkv", "budget_tokens": 256, "store_dtype": "model", "retire_tokens": PAGE}
    )
    schedule = StateLayout.of(config, PAGE, 64, torch.bfloat16).schedule
    planner, start = SharingPlanner([schedule], config, config.policy_class), 256
    assert list(schedule.events(start - 1, end)) == [256, 272, 288, 304]
    plan = planner.build([0, end - start], [end], [0], TABLE)
    target, readers, last = plan.shared.target, plan.shared.readers, plan.shared.last_reader
    assert [len(r.retires) for r in plan.rounds] == [1, 1, 1] + [0] * (not waits)
    assert [len(r.retires) for r in target] == [1, 1, 0] if waits else [1, 1, 1, 0]
    assert all(a.attends is b.attends for a, b in zip(plan.rounds, target, strict=True))
    assert [len(r.retires) for r in readers] == [0] and [len(r.retires) for r in last] == [int(waits)]
    (work,), seen = readers[0].attends, plan.rounds[-1].attends[0]
    assert work.observe_from is None and seen.observe_from is not None
    assert (work.first_token, work.num_queries) == (seen.first_token, seen.num_queries)
    assert work.pages.equal(seen.pages) and last[0].attends is readers[0].attends


@pytest.mark.parametrize("store_dtype", ["model", "int4"])
def test_a_drafter_s_pass_beyond_the_committed_tokens_only_attends(store_dtype):
    """Over every count of committed tokens: a pass with one token more does what the model's step did, and one with a token
    beyond it attends to what that step has left."""
    values = {"policy": "momentkv", "budget_tokens": 256, "store_dtype": store_dtype, "observation_tokens": LAST}
    config = EvictionConfig.from_dict(values)
    schedule = StateLayout.of(config, PAGE, 64, torch.bfloat16).schedule
    planner, events = StepPlanner([schedule], config, config.policy_class), 0
    for known in range(200, TOKENS - 4):
        step = planner.build([0, 1], [known], [0], TABLE)
        first = planner.build([0, 2], [known + 1], [0], TABLE, committed=[known])
        later = planner.build([0, 1], [known + 3], [0], TABLE, committed=[known])
        retired = [described(w) for r in step.rounds for w in r.retires]
        assert [described(w) for r in first.rounds for w in r.retires] == retired
        assert not any(r.retires for r in later.rounds)
        events += len(retired)
        assert observed_tokens(first, known - 1) == observed_tokens(step, known - 1) and not observed_tokens(
            later, known + 2
        )
        for work in [w for r in later.rounds for w in r.attends]:
            boundary = schedule.boundary_column(known)
            assert work.num_evicted.tolist() == [schedule.evicted_tokens(boundary)]
            columns = [*range(schedule.store_pages), *range(boundary, (known + 2) // PAGE + 1)]
            assert work.pages.tolist() == [TABLE[0, columns].tolist()]
    assert events > 10


def observed_tokens(plan, start: int) -> list[int]:
    """Positions of the queries whose attention is observed, of a step whose first token is at `start`."""
    found = []
    for work in [w for r in plan.rounds for w in r.attends if w.observe_from is not None]:
        first, queries = start + int(work.first_token), int(work.num_queries)
        found += range(first + int(work.observe_from), first + queries)
    return found
