"""Model families in the real engine: stock's tokens below the budget, bounded above it, or refused by name."""

import pytest
from engine import Engine, random_prompt
from model_families import FAMILIES, make_config, make_model
from vllm import EngineArgs
from vllm.model_executor.models import registry

BUDGET, STEP = 256, 256
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048, "max_num_batched_tokens": STEP}
INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 96}
REFUSED = {name: family for name, family in FAMILIES.items() if family.refused}


@pytest.fixture(autouse=True)
def inspected_here(monkeypatch):
    """vLLM asks another process what a model class can do, lest CUDA be initialised; here that is only slow."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return lambda name: make_model(name, root / name.replace(" ", "-"))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in REFUSED])
def test_served(engine, family_model, name):
    dtype, short = FAMILIES[name].dtype, [random_prompt(n) for n in (20, 150)]
    stock = engine(family_model(name), max_model_len=2048, block_size=32, dtype=dtype).generate(short, 12)
    e = engine(family_model(name), **EVICT, dtype=dtype)
    assert e.generate(short, 12) == stock
    size, rounding = e.manager.block_size, 2 if e.manager.blocks.pages > 1 else 0
    length = 1200 if rounding else 700
    (tokens,) = e.generate([random_prompt(length)], 12)
    assert len(tokens) == 12 and e.manager.metrics.values
    assert max(e.peak_pages.values()) <= (BUDGET + STEP) // size + rounding < length // size


@pytest.mark.parametrize(
    ("name", "store"),
    [("Gemma 3", INT8), ("GPT-OSS", INT8), ("Gemma 4 31B", {}), ("Llama 4", {}), ("Phi-4-mini", INT8)],
)
def test_layers_of_several_kinds_in_any_chunks(engine, family_model, name, store):
    """Pages change hands between layers that evict and layers that do not; a sink takes its mass whoever attends."""
    prompts = [random_prompt(n, seed=2) for n in (300, 700)]
    coarse = engine(family_model(name), **EVICT | store | {"max_num_batched_tokens": 512}).generate(prompts, 24)
    fine = engine(family_model(name), **EVICT | store | {"max_num_batched_tokens": 64}, enable_prefix_caching=True)
    for _ in range(2):
        assert fine.generate(prompts, 24) == coarse
    below, beyond = list(fine.cached_tokens.values())[2:]
    assert below and beyond > BUDGET, "the second time a prefix and a state were meant to be found"


def test_layers_of_several_kinds_and_exact_prompts_share_nothing_beyond_the_budget(engine, family_model):
    """Pages of layers with a window have one key, whether the prompt was exact (up to 1,024 tokens) or longer."""
    text = random_prompt(1100, seed=2)
    prompts = [text[:600], text, text[:700], text + random_prompt(20)[1:]]
    options = EVICT | {"prefill": "auto"}
    plain, cached = (engine(family_model("Gemma 3"), **options, enable_prefix_caching=c) for c in (False, True))
    for prompt in prompts:
        assert cached.generate([prompt], 16) == plain.generate([prompt], 16)
    assert cached.manager.books[0].states is None and 0 < max(cached.cached_tokens.values()) < BUDGET


@pytest.mark.parametrize("name", [n for n, f in REFUSED.items() if not f.by_layers])
def test_refused_before_loading(tmp_path, name):
    """There are no weights."""
    carrier = {"kv_eviction": {"policy": "momentkv", "budget_tokens": BUDGET}}
    args = EngineArgs(model=str(make_config(name, tmp_path)), max_model_len=2048, additional_config=carrier)
    with pytest.raises(ValueError, match=REFUSED[name].refused) as error:
        args.create_engine_config()
    assert "serve without --kv-eviction" in str(error.value)


@pytest.mark.parametrize("name", [n for n, f in REFUSED.items() if f.by_layers])
def test_refused_by_its_layers(family_model, name):
    with pytest.raises(ValueError, match=REFUSED[name].refused) as error:
        Engine(family_model(name), **EVICT)
    assert "serve without --kv-eviction" in str(error.value)
