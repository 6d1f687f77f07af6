"""Layers that keep states beside layers that evict: what is said and refused before loading, and the real engine."""

import logging

import pytest
import transformers
from configured import config_of
from documents import rows
from engine import Engine, random_prompt
from model_families import make_config, make_model
from published_hybrids import PUBLISHED
from tiny_models import save_tokenizer

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import expected_layout
from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_schedule import cdiv

BUDGET = 256
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048}
PROMPTS = [random_prompt(n, seed=3) for n in (90, 700, 1100)]


pytestmark = pytest.mark.usefixtures("inspected_here")


def carrier(budget, **settings):
    return {"kv_eviction": {"policy": "momentkv", "budget_tokens": budget} | settings}


@pytest.mark.parametrize("row", rows("hybrids.md", "| model | vLLM's block on a CPU"), ids=lambda row: row[0])
def test_blocks_of_published_shapes(tmp_path, row):
    name, block, sensible, held = row
    config, architecture, settings = PUBLISHED[name]
    made = getattr(transformers, config)(**settings, architectures=[architecture], max_position_embeddings=16384)
    made.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    found = config_of(tmp_path, dtype="bfloat16", max_model_len=16384, additional_config=carrier(4096))
    size, schedule = found.cache_config.block_size, expected_layout(EvictionConfig.from_vllm(found), found).schedule
    blocks = PageBlocks.of(schedule, size).budget
    assert (block, sensible, held) == (f"{size}", f"{2 * size}", f"{blocks} blocks, {blocks * size} tokens")


def test_blocks_are_settled_and_said_before_loading(tmp_path, caplog):
    """The block is as large as a state of float32, the pages are those of any other model."""
    model = make_config("Nemotron-H", tmp_path)
    logger = logging.getLogger("vllm.momentkv_vllm.vllm_seams")
    logger.addHandler(caplog.handler)
    config = config_of(model, dtype="float32")
    logger.removeHandler(caplog.handler)
    state, token = 4 * (3 * 384 + 8 * 32 * 64), 4 * 2 * 2 * 32
    assert config.cache_config.block_size == 32 * cdiv(state, 32 * token) == 160
    assert not config.cache_config.enable_prefix_caching and "prefix caching is switched off" in caplog.text
    assert "holds up to 4 blocks, the memory of 640 tokens; the least sensible budget is 320" in caplog.text
    with pytest.raises(ValueError, match="least is 48 "):
        config_of(model, additional_config=carrier(32))
    with pytest.raises(ValueError, match=r"leaves 4 pages of 160 tokens, but a sequence needs up to 5: 4 for"):
        config_of(model, dtype="float32", num_gpu_blocks_override=5, max_num_batched_tokens=256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism of hybrid models"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching of models with Mamba layers"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager of hybrid models"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding of hybrid models",
        ),
    ],
)
def test_options_that_were_not_tried_beside_states(tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        config_of(make_config("Granite 4 hybrid", tmp_path), **options)
    assert "serve without --kv-eviction" in str(error.value)


@pytest.mark.parametrize(("attention", "states"), [(3, 2), (4, 2)])
def test_more_attention_than_states(tmp_path, attention, states):
    """vLLM makes one group of the layers that attend unless they are 1.5 times as many."""
    types = ["attention"] * attention + ["mamba"] * states
    config = transformers.GraniteMoeHybridConfig(
        layer_types=types, num_hidden_layers=len(types), architectures=["GraniteMoeHybridForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=f"{attention} attention layers and {states} others of hybrid models"):
        config_of(tmp_path)


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    return make_model("Granite 4 hybrid", tmp_path_factory.mktemp("granite") / "m")


@pytest.mark.engine
@pytest.mark.parametrize("settings", [{}, {"prefill": "auto", "exact_prompt_tokens": 800, "store_dtype": "int8"}])
def test_tokens_do_not_depend_on_scheduling(engine, granite, settings):
    """Alone, and together in small steps: blocks change hands between states, pages of tokens and rewritten pages."""
    one = engine(granite, **EVICT | settings, max_num_batched_tokens=512)
    alone = [one.generate([p], 24)[0] for p in PROMPTS]
    many = engine(granite, **EVICT | settings, max_num_batched_tokens=64)
    assert many.generate(PROMPTS, 24) == alone
    blocks = cdiv(BUDGET + 64, many.manager.block_size) + 2
    assert many.manager.books[0].blocks.pages > 1 and many.peak_pages["r2"] <= blocks < 1100 // many.manager.block_size
    assert many.generate(PROMPTS[1:2], 24, n=2, temperature=1.0, seed=5) == one.generate(
        PROMPTS[1:2], 24, n=2, temperature=1.0, seed=5
    )


@pytest.mark.engine
def test_a_pool_without_room_for_states(engine, granite):
    """Three groups of one layer keep states, in a block each: the least pool serves a long prompt, a smaller one would wait."""
    e = engine(granite, **EVICT, num_gpu_blocks_override=(least := 5 + 3) + 1)
    assert e.manager.books[0].blocks.least_pool(256) == 5, (
        "8 pages of store and moments in 1 of 10, a window of 8 + 16 in 4"
    )
    assert len(e.generate(PROMPTS[2:], 8)[0]) == 8
    with pytest.raises(ValueError, match=rf"needs up to {least}: 5 for --kv-budget 256 .* 3 for states of other"):
        Engine(granite, **EVICT, num_gpu_blocks_override=least)


@pytest.mark.engine
def test_tokens_are_those_of_an_engine_that_never_preempts(engine, granite):
    prompts = [random_prompt(n, seed=4) for n in (100, 110, 120)]
    roomy = engine(granite, **EVICT).generate(prompts, 250)
    tight = engine(granite, **EVICT, num_gpu_blocks_override=16)
    assert tight.generate(prompts, 250) == roomy
    assert tight.preemptions and tight.manager.metrics.values, "nobody was in the way"


@pytest.mark.engine
@pytest.mark.parametrize("budget", [512, 1024])
def test_hits_give_the_tokens_of_the_first_time(engine, tmp_path_factory, budget):
    """Copies of blocks stay in the cache when a sequence rewrites them; with two layers to a group, states lie in their bytes."""
    model = make_model("Qwen3-Next", tmp_path_factory.getbasetemp() / "qwen3-next")
    options = {"policy": "momentkv", "budget_tokens": budget, "max_model_len": 2048, "dtype": "bfloat16"}
    e = engine(model, **options, enable_prefix_caching=True)
    prompts = [random_prompt(n, seed=6) for n in (500, 1500)]
    first = [e.generate([p], 16)[0] for p in prompts]
    for _ in range(2):
        assert [e.generate([p], 16)[0] for p in prompts] == first
    assert all(list(e.cached_tokens.values())[2:]), "the second time prefixes were meant to be found"
