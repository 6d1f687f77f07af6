"""Models that hear or see: what their encoders give is tokens like any other, evicted like any other."""

import pytest
from multimodal_models import heard, make_audio_model, make_image_model, seen

pytestmark = pytest.mark.engine

BUDGET = 512
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET}
# Sounds of 2 and 3 s; an image of 4 x 4 tiles, one of 3 x 4. Then what is longer than the budget: 24 s, two thousand words.
SHORT = {make_audio_model: [heard(2, 9), heard(3, 40, seed=1)], make_image_model: [seen(448, 9), seen(300, 40, seed=1)]}
LONG = {
    make_audio_model: [heard(24, 300), heard(24, 300, seed=1)],
    make_image_model: [seen(448, 600), seen(448, 600, seed=1)],
}


@pytest.fixture(scope="module", params=[make_audio_model, make_image_model], ids=["audio", "image"])
def model(request, tmp_path_factory):
    return request.param, request.param(tmp_path_factory.mktemp("model"))


def test_below_the_budget_nothing_changes(engine, model):
    make, folder = model
    stock = engine(folder, max_num_batched_tokens=1024).generate(SHORT[make], 12)
    e = engine(folder, **EVICT, max_num_batched_tokens=1024)
    assert e.generate(SHORT[make], 12) == stock
    assert stock[0] != stock[1]


def test_longer_ones_are_bounded_whatever_the_steps_and_the_prefixes(engine, model):
    make, folder = model
    coarse = engine(folder, **EVICT, max_num_batched_tokens=1024)
    tokens = coarse.generate(LONG[make], 24)
    assert max(coarse.peak_pages.values()) <= (BUDGET + 1024) // 16
    assert coarse.manager.metrics.values
    assert tokens[0] != tokens[1], "the same words after another sound or image"
    fine = engine(folder, **EVICT, max_num_batched_tokens=640, enable_prefix_caching=True)
    assert fine.generate(LONG[make], 24) == tokens
    assert fine.generate(LONG[make], 24) == tokens
    assert all(list(fine.cached_tokens.values())[2:]), "the second time prefixes were meant to be found"
