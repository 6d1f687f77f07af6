"""Models that hear or see: what their encoders give is tokens like any other, evicted like any other."""

import pytest
from family_settings import PUBLISHED
from multimodal_models import (
    heard,
    make_audio_model,
    make_deepstack_model,
    make_hybrid_image_model,
    make_image_model,
    make_qwen_image_model,
    seen,
)

pytestmark = pytest.mark.usefixtures("inspected_here")

BUDGET = 512
QWEN = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET}
HYBRID = "Qwen3_5ForConditionalGeneration"


def seeing(make, **how) -> tuple:
    """How the model is made, prompts below the budget, prompts beyond it."""
    return make, [seen(448, 9, **how), seen(300, 40, seed=1, **how)], [seen(448, 600, seed=i, **how) for i in range(2)]


CASES = {
    "Qwen2AudioForConditionalGeneration": (
        make_audio_model,
        [heard(2, 9), heard(3, 40, seed=1)],
        [heard(24, 300), heard(24, 300, seed=1)],
    ),
    "Idefics3ForConditionalGeneration": seeing(make_image_model),
    "Qwen2_5_VLForConditionalGeneration": seeing(make_qwen_image_model, **QWEN),
    "Qwen3VLForConditionalGeneration": seeing(make_deepstack_model, **QWEN),
    HYBRID: seeing(make_hybrid_image_model, **QWEN),
}


def test_they_are_those_of_the_table():
    assert set(CASES) == {name for name, published in PUBLISHED.items() if published.given != "text"}


@pytest.fixture(scope="module", params=[name for name in CASES if name != HYBRID])
def case(request, tmp_path_factory):
    """(folder of the model, short prompts, long prompts)"""
    make, short, long = CASES[request.param]
    return make(tmp_path_factory.mktemp("model")), short, long


def test_below_the_budget_nothing_changes(engine, case):
    folder, short, _ = case
    stock = engine(folder, max_num_batched_tokens=1024).generate(short, 12)
    e = engine(folder, **EVICT, max_num_batched_tokens=1024)
    assert e.generate(short, 12) == stock
    assert stock[0] != stock[1]


def test_longer_ones_are_bounded_whatever_the_steps_and_the_prefixes(engine, case):
    folder, _, long = case
    coarse = engine(folder, **EVICT, max_num_batched_tokens=1024)
    tokens = coarse.generate(long, 24)
    assert max(coarse.peak_pages.values()) <= (BUDGET + 1024) // 16
    assert coarse.manager.metrics.values
    assert tokens[0] != tokens[1], "the same words after another sound or image"
    fine = engine(folder, **EVICT, max_num_batched_tokens=640, enable_prefix_caching=True)
    assert fine.generate(long, 24) == tokens
    assert fine.generate(long, 24) == tokens
    second = list(fine.cached_tokens.values())[2:]
    assert min(second) > BUDGET, "the second time states were meant to be found"


def test_a_hybrid_that_sees(engine, tmp_path):
    """Qwen3.5: blocks of 160 tokens, and bfloat16 alone, in which near ties depend on the steps."""
    make, short, long = CASES[HYBRID]
    folder, options = make(tmp_path), {"max_num_batched_tokens": 1024, "dtype": "bfloat16"}
    stock = engine(folder, **options).generate(short, 12)
    e = engine(folder, **EVICT, **options)
    assert e.generate(short, 12) == stock and stock[0] != stock[1]
    e.generate([{**prompt, "prompt": f"{prompt['prompt']} {' '.join(['w5'] * 1400)}"} for prompt in long], 12)
    assert e.manager.metrics.values
    assert max(e.peak_pages.values()) <= (BUDGET + 1024) // e.manager.block_size + 2 < 2100 // e.manager.block_size
