"""10,000 random schedules against the brute-force model of page ownership (ownership_model.py), one in 25 of them in `make test`. No model,
no engine."""

from itertools import product

import pytest
from ownership_model import Simulation, cheap_hash
from quick import quick
from vllm.v1.core.kv_cache_utils import init_none_hash

from momentkv_vllm.metrics import RETIRED_PAGES, STATE_HITS
from momentkv_vllm.plugin import register

SCHEDULES, OF_BLOCKS, PARTS = 10_000, 400, 25


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


@pytest.mark.parametrize("part", quick([0], range(PARTS)))
def test_random_schedules(part):
    seeds = range(part, SCHEDULES, PARTS)
    hits, preemptions, evicted, resumed = run_all(seeds)
    assert hits > len(seeds) and preemptions > len(seeds) / 10, "too tame to prove anything"
    assert evicted > 0.4 * len(seeds) and resumed > 0.4 * len(seeds), "too tame to prove anything"


@pytest.mark.parametrize(("pages", "part"), quick([(3, 0), (5, 0)], product((3, 5), (0, 1))))
def test_random_schedules_of_pages_inside_blocks(pages, part):
    """vLLM's blocks are as large as the states of a model's other layers, our pages are not."""
    seeds = range(part, OF_BLOCKS, 2)
    hits, preemptions, evicted, _ = run_all(seeds, pages)
    assert hits > len(seeds) / 10 and preemptions > len(seeds) / 40 and evicted > len(seeds) / 10, "too tame"
