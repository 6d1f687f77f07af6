"""Model families in the real engine: stock's tokens below the budget, bounded above it, or refused by name."""

import pytest
from engine import Engine, random_prompt
from model_families import FAMILIES, make_model

pytestmark = pytest.mark.engine

BUDGET = 192
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048}


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return lambda name: make_model(name, root / name.replace(" ", "-"))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.refused])
def test_served(engine, family_model, name):
    short = [random_prompt(n) for n in (20, 150)]
    stock = engine(family_model(name), max_model_len=2048, block_size=32).generate(short, 12)
    e = engine(family_model(name), **EVICT)
    assert e.generate(short, 12) == stock
    (tokens,) = e.generate([random_prompt(500)], 12)
    assert len(tokens) == 12 and e.manager.metrics.values
    assert max(e.peak_pages.values()) <= (BUDGET + 256) // e.manager.block_size


@pytest.mark.parametrize("name", ["Gemma 3", "GPT-OSS"])
def test_sliding_window_layers_and_sinks_in_any_chunks(engine, family_model, name):
    """Pages change hands between layers that evict and layers that do not; a sink takes its mass whoever attends."""
    prompts = [random_prompt(n, seed=2) for n in (300, 700)]
    coarse = engine(family_model(name), **EVICT, max_num_batched_tokens=512).generate(prompts, 24)
    fine = engine(family_model(name), **EVICT, max_num_batched_tokens=64, enable_prefix_caching=True)
    for _ in range(2):
        assert fine.generate(prompts, 24) == coarse
    assert all(list(fine.cached_tokens.values())[2:]), "the second time prefixes were meant to be found"


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.refused])
def test_refused(family_model, name):
    with pytest.raises(Exception) as error:
        Engine(family_model(name), **EVICT)
    assert FAMILIES[name].refused in str(error.value)
