"""An fp8 KV cache in a real vLLM engine: stock's tokens below the budget, tokens independent of scheduling above it, its scales."""

import pytest
from engine import random_prompt
from quick import quick
from vllm.model_executor.layers.attention import attention

from momentkv_vllm.fp8 import KINDS

PROMPTS = [random_prompt(n) for n in (30, 390, 700, 1100)]
FP8 = {"kv_cache_dtype": "fp8"}
EVICT = {**FP8, "policy": "momentkv", "budget_tokens": 384}
STORES = {"fp8": {"moment_dtype": "float32"}, "int4": {"store_dtype": "auto", "budget_tokens": 256}}
"""What `store_dtype` model and auto are."""

pytestmark = pytest.mark.usefixtures("inspected_here")


@pytest.fixture
def scaled(monkeypatch):
    """Layers whose checkpoint brings scales: vLLM's own defaults are replaced, in stock engines too."""
    default = attention.set_default_quant_scales

    def with_scales(layer, *args, **kwargs) -> None:
        default(layer, *args, **kwargs)
        layer._k_scale_float, layer._v_scale_float = 0.37, 0.011

    monkeypatch.setattr(attention, "set_default_quant_scales", with_scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_below_the_budget_tokens_are_stocks(engine, models, kind, dtype):
    prompts = [random_prompt(n) for n in (5, 200, 700, 1500)]
    options = {"model": models(seed=1), "kv_cache_dtype": kind, "dtype": dtype}
    stock = engine(**options, block_size=32).generate(prompts)
    ours = engine(**options, policy="momentkv", budget_tokens=2048)
    assert ours.generate(prompts) == stock
    assert ours.manager.block_size == 32, "vLLM's CPU attention reads fp8 in no other pages"
    assert ours.manager.kv_cache_spec.page_size_bytes == 32 * 2 * 2 * 32, "a token is a byte per number of its heads"
    assert engine(**options | {"kv_cache_dtype": "auto"}, block_size=32).generate(prompts) != stock


def test_scales_are_stocks_below_the_budget_and_heard_above(engine, models, scaled):
    options = {**FP8, "model": models(seed=1)}
    stock = engine(**options, block_size=32).generate(PROMPTS)
    assert engine(**options, policy="momentkv", budget_tokens=2048).generate(PROMPTS) == stock
    runs = [
        engine(**EVICT, model=models(seed=1), kernels=kernels).generate(PROMPTS, 40) for kernels in ("cpu", "reference")
    ]
    assert runs[0] == runs[1]
    assert runs[0] != stock


@pytest.mark.parametrize("store", STORES)
def test_tokens_do_not_depend_on_chunk_size_or_batch(engine, models, store):
    options = {**EVICT, **STORES[store], "model": models(seed=1)}
    alone = engine(**options, max_num_batched_tokens=2048)
    one_by_one = [alone.generate([p], 24)[0] for p in PROMPTS]
    assert max(alone.peak_pages.values()) <= options["budget_tokens"] // 32 + 2048 // 32
    assert engine(**options, max_num_batched_tokens=96).generate(PROMPTS, 24) == one_by_one


@pytest.mark.parametrize("store", quick(["int4"], STORES))
def test_preemption_gives_the_same_tokens(engine, models, store):
    options = {**EVICT, **STORES[store], "model": models(seed=1)}
    prompts = [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240)]
    calm = engine(**options).generate(prompts, 250)
    tight = engine(**options, num_gpu_blocks_override=30, watermark=0.0)
    assert tight.generate(prompts, 250) == calm
    assert tight.preemptions, "the pool was meant to be too small"


@pytest.mark.parametrize("store", STORES)
def test_prefixes_and_states_are_found(engine, models, store):
    document = random_prompt(1200, seed=3)
    prompts = [document + random_prompt(40, seed)[1:] for seed in range(3)]
    options = {**EVICT, **STORES[store], "model": models(seed=1)}
    plain = engine(**options).generate(prompts, 24)
    cached = engine(**options, enable_prefix_caching=True)
    assert [cached.generate([p], 24)[0] for p in prompts] == plain
    assert cached.cached_tokens["r2"] > 1000


def test_heads_may_hold_different_numbers_of_tokens(engine, models):
    options = {**EVICT, "budget_tokens": 256, "store_dtype": "auto", "model": models(seed=1)}
    prompts = [random_prompt(n) for n in (1300, 1700)]
    answers = [engine(**options, max_num_batched_tokens=n).generate(prompts, 40) for n in (96, 512)]
    assert answers[0] == answers[1]
    assert engine(**options, head_budgets="equal").generate(prompts, 40) != answers[0], "what heads hold must matter"


@pytest.mark.parametrize(
    "name",
    quick(
        ["Gemma 3n", "Granite 4 hybrid", "GPT-OSS"], ["Gemma 3", "Gemma 3n", "Granite 4 hybrid", "Gemma 2", "GPT-OSS"]
    ),
)
def test_families_with_other_layers_beside(engine, family_model, name):
    """Windows, shared caches, states, capped logits, sinks: stock's tokens below the budget, chunk independence above it."""
    options = {**FP8, "model": family_model(name), "max_model_len": 2048, "block_size": 32}
    below = [random_prompt(n, seed=2) for n in (90, 200)]
    stock = engine(**options, max_num_batched_tokens=1024).generate(below, 24)
    ours = engine(**options, policy="momentkv", budget_tokens=512, max_num_batched_tokens=1024)
    assert ours.generate(below, 24) == stock
    long = [random_prompt(n, seed=2) for n in (1000, 1200)]
    alone = [ours.generate([p], 24)[0] for p in long]
    assert (
        engine(**options, policy="momentkv", budget_tokens=512, max_num_batched_tokens=96).generate(long, 24) == alone
    )
