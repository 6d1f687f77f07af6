"""Models that hear or see: what their encoders give is tokens like any other, evicted like any other."""

import pytest
from multimodal_models import heard, make_audio_model, make_image_model, make_qwen_image_model, seen

pytestmark = pytest.mark.usefixtures("inspected_here")

BUDGET = 512
QWEN = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET}
# How the model is made, prompts below the budget, prompts beyond it.
CASES = {
    "audio": (
        make_audio_model,
        [heard(2, 9), heard(3, 40, seed=1)],
        [heard(24, 300), heard(24, 300, seed=1)],
    ),
    "image": (
        make_image_model,
        [seen(448, 9), seen(300, 40, seed=1)],
        [seen(448, 600), seen(448, 600, seed=1)],
    ),
    "qwen image": (
        make_qwen_image_model,
        [seen(448, 9, **QWEN), seen(300, 40, seed=1, **QWEN)],
        [seen(448, 600, **QWEN), seen(448, 600, seed=1, **QWEN)],
    ),
}


@pytest.fixture(scope="module", params=CASES)
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
