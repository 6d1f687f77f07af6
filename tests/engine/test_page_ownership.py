"""10,000 random schedules against the brute-force model of page ownership (ownership_model.py). No model, no engine."""

import pytest
from ownership_model import Simulation, cheap_hash
from vllm.v1.core.kv_cache_utils import init_none_hash

from momentkv_vllm.metrics import RETIRED_PAGES, STATE_HITS
from momentkv_vllm.plugin import register

SCHEDULES, OF_BLOCKS = 10_000, 400


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    init_none_hash(cheap_hash)


def run_all(seeds, *settings) -> tuple[int, int, int, int]:
    """Prefix hits, preemptions, simulations that evicted, requests that went on from a state."""
    hits = preemptions = evicted = resumed = 0
    for seed in seeds:
        simulation = Simulation(seed, *settings)
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        hits += simulation.hits
        preemptions += simulation.preemptions
        evicted += simulation.manager.metrics.values[RETIRED_PAGES, 0] > 0
        resumed += simulation.manager.metrics.values[STATE_HITS, 0]
    return hits, preemptions, evicted, resumed


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_random_schedules(part):
    hits, preemptions, evicted, resumed = run_all(range(part, SCHEDULES, 4))
    assert hits > SCHEDULES / 4 and preemptions > SCHEDULES / 40, "too tame to prove anything"
    assert evicted > SCHEDULES / 10 and resumed > SCHEDULES / 10, "too tame to prove anything"


@pytest.mark.parametrize("pages", [3, 5])
def test_random_schedules_of_pages_inside_blocks(pages):
    """vLLM's blocks are as large as the states of a model's other layers, our pages are not."""
    hits, preemptions, evicted, _ = run_all(range(OF_BLOCKS), pages)
    assert hits > OF_BLOCKS / 10 and preemptions > OF_BLOCKS / 40 and evicted > OF_BLOCKS / 10, "too tame"
