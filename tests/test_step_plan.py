"""What the host plans for a step: attention is observed where an event will need it, and nowhere else."""

import pytest
import torch

from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout

PAGE, TOKENS, LAST = 16, 900, 8
TABLE = torch.arange(1, 1 + TOKENS // PAGE + 1)[None]


def planned(policy, store_dtype):
    """(for every token whether its attention is observed, the schedule) of a sequence that is decoded from the first one on."""
    values = {"policy": policy, "budget_tokens": 256, "store_dtype": store_dtype, "observation_tokens": LAST}
    config = EvictionConfig.from_dict(values)
    schedule = StateLayout.of(config, PAGE, 64, torch.bfloat16).schedule
    planner, observed = StepPlanner(schedule, config, config.policy_class), []
    for end in range(1, TOKENS + 1):
        rounds = planner.build([0, 1], [end], [0], TABLE).rounds
        observed.append(any((w.observe_from < w.num_queries).any() for r in rounds for w in r.attends))
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
