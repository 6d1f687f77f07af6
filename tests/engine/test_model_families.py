"""Model families in the real engine: stock's tokens below the budget, bounded above it, or refused by name."""

from dataclasses import replace

import pytest
from engine import Engine, random_prompt
from model_families import FAMILIES, TEXT_ONLY, make_config, make_seeing_model
from quick import quick
from vllm import EngineArgs

from momentkv_vllm.attention.cpu_backend import MomentKVImpl

BUDGET, STEP = 256, 256
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048, "max_num_batched_tokens": STEP}
INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 96}
REFUSED = {name: family for name, family in FAMILIES.items() if family.refused}


pytestmark = pytest.mark.usefixtures("inspected_here")


# Plain, mixture of experts, windows, sinks, wide heads, chunked attention, scaled RoPE, none in some layers, layers without
# attention, linear attention, convolutions. Every other family is like one of them in what eviction meets.
STRUCTURES = ("Llama", "Qwen3-MoE", "Gemma 3, 4B", "GPT-OSS", "Gemma 4", "Llama 4", "Phi-4-mini", "SmolLM3", "Granite 4 hybrid",
              "Qwen3-Next", "LFM2")  # fmt: skip


def served(engine, folder, dtype, **options) -> None:
    short, options = [random_prompt(n) for n in (20, 150)], options | {"max_model_len": 2048, "dtype": dtype}
    stock = engine(folder, block_size=32, **options).generate(short, 12)
    e = engine(folder, **EVICT | options)
    assert e.generate(short, 12) == stock
    size, rounding = e.manager.block_size, 2 if e.manager.books[0].blocks.pages > 1 else 0
    length = 1200 if rounding else 700
    (tokens,) = e.generate([random_prompt(length)], 12)
    assert len(tokens) == 12 and e.manager.metrics.values
    assert max(e.peak_pages.values()) <= (BUDGET + STEP) // size + rounding < length // size


@pytest.mark.parametrize("name", quick(STRUCTURES, (n for n in FAMILIES if n not in REFUSED)))
def test_served(engine, family_model, name):
    served(engine, family_model(name), FAMILIES[name].dtype)


@pytest.mark.parametrize(
    "name", quick(["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"], TEXT_ONLY)
)
def test_the_text_of_models_that_also_see(engine, tmp_path, name):
    """With --language-model-only the published class is served like its text model."""
    served(engine, make_seeing_model(name, tmp_path), FAMILIES[TEXT_ONLY[name].family].dtype, language_model_only=True)


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("Gemma 2", INT8),
        ("Gemma 3", INT8),
        ("GPT-OSS", INT8),
        ("Gemma 4 31B", {}),
        ("Llama 4", {}),
        ("Phi-4-mini", INT8),
    ],
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


def test_a_cap_of_the_logits_reaches_the_kernels(engine, family_model, monkeypatch):
    """Without it the tokens beyond the budget are others."""
    prompt, options = [random_prompt(700)], EVICT | {"dtype": "float32"}
    capped = engine(family_model("Gemma 2"), **options).generate(prompt, 24)
    assert len(set(capped[0])) > 5
    view = MomentKVImpl.view
    monkeypatch.setattr(MomentKVImpl, "view", staticmethod(lambda *given: replace(view(*given), softcap=0.0)))
    assert engine(family_model("Gemma 2"), **options).generate(prompt, 24) != capped


def test_layers_of_several_kinds_and_exact_prompts_share_nothing_beyond_the_budget(engine, family_model):
    """Pages of layers with a window have one key, whether the prompt was exact (up to 1,024 tokens) or longer."""
    text = random_prompt(1100, seed=2)
    prompts = [text[:600], text, text[:700], text + random_prompt(20)[1:]]
    options = EVICT | {"prefill": "auto"}
    plain, cached = (engine(family_model("Gemma 3"), **options, enable_prefix_caching=c) for c in (False, True))
    for prompt in prompts:
        assert cached.generate([prompt], 16) == plain.generate([prompt], 16)
    assert cached.manager.books[0].states is None and 0 < max(cached.cached_tokens.values()) < BUDGET


@pytest.mark.parametrize(("bidirectional", "refused"), [("vision", True), (None, False)])
def test_images_of_gemma_4(tmp_path, bidirectional, refused):
    """The large ones read them in both directions, the E ones from left to right."""
    folder = make_seeing_model(
        "Gemma4ForConditionalGeneration (E)", tmp_path, use_bidirectional_attention=bidirectional
    )
    carrier = {"kv_eviction": {"policy": "momentkv", "budget_tokens": BUDGET}}
    args = EngineArgs(model=str(folder), max_model_len=2048, additional_config=carrier)
    if not refused:
        assert args.create_engine_config()
        return
    with pytest.raises(ValueError, match="read images in both directions.*--language-model-only"):
        args.create_engine_config()


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
