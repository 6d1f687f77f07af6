"""The simulator against the engine: every policy's score but one, schedule, correction and observation, on the same tokens."""

import pytest
import torch
from simulated import log_probabilities

from momentkv_vllm.policies import names

pytestmark = pytest.mark.engine

PAGE, PROMPT, NEW = 16, 300, 40
OTHERS = {
    "momentkv, off": {"policy": "momentkv", "correction": "off"},
    "momentkv, first": {"policy": "momentkv", "correction": "first", "moment_dtype": "int8"},
    "momentkv, full": {"policy": "momentkv", "prefill": "full", "observation_tokens": 20},
    "momentkv, a coarse grain": {"policy": "momentkv", "prefill_retire_tokens": 96},
    "snapkv, chunked": {"policy": "snapkv", "prefill": "chunked", "correction": "zeroth"},
    "paper, chunked": {"policy": "paper", "prefill": "chunked"},
    # Its score keeps the covariance, which is no part of this correction.
    "paper, zeroth": {"policy": "paper", "prefill": "chunked", "correction": "zeroth", "moment_dtype": "float32"},
}
# A token's key has the same norm wherever it stands in the first layer, so among the few words of this model rounding decides
# what knorm keeps.
KINDS = {**{name: {"policy": name} for name in names() if name != "knorm"}, **OTHERS}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_engines(engine, models, kind):
    """Budget 128: some fifteen events, in the prompt or after it. What was decoded is read again by the simulator."""
    values = {"budget_tokens": 128, **KINDS[kind]}
    found = log_probabilities(engine, models(seed=1), values, PAGE, PROMPT, NEW)
    torch.testing.assert_close(found.simulator, found.engine, atol=2e-3, rtol=0)
    assert (found.simulator - found.full).abs().max() > 0.02, "eviction must matter here"
