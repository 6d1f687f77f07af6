"""The simulator that marks who is alive, against the one that moves tokens; its oracle and its shared budgets."""

import pytest
import torch
from research.bounds import WHAT, Layer, Variant
from research.simulate import Eviction, evicting_attention, exact_attention

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout

HEADS, TOKENS, SCALE = 3, 768, 0.125
CONFIG = EvictionConfig.from_dict({"policy": "momentkv", "budget_tokens": 128})
LAYOUT = StateLayout.of(CONFIG, 16, 64, torch.bfloat16)


@pytest.fixture(scope="module")
def qkv():
    torch.manual_seed(0)
    query = 1.5 * torch.randn(1, 3 * HEADS, TOKENS, 64)
    return query, torch.randn(1, HEADS, TOKENS, 64) + torch.randn(1, HEADS, 1, 64), torch.randn(1, HEADS, TOKENS, 64)


def test_the_default_is_the_simulators(qkv):
    moved = evicting_attention(*qkv, SCALE, Eviction.of(CONFIG, LAYOUT.schedule, 0, LAYOUT.packed))
    torch.testing.assert_close(Layer(*qkv, SCALE, Variant(LAYOUT)).attend(), moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", [name for name in WHAT if WHAT[name].get("shared")])
def test_heads_that_share_hold_as_many_runs_as_heads_that_do_not(qkv, what):
    layer = Layer(*qkv, SCALE, Variant(LAYOUT, **WHAT[what]))
    layer.attend()
    held = layer.alive[0].sum(-1)
    store, window = LAYOUT.schedule.store_tokens, TOKENS - layer.boundary
    assert held.sum() == HEADS * (store + window)
    assert held.min() >= store // 5 // 8 * 8 + window
    assert len(held.unique()) > 1, "no head has more than its part"


def test_the_oracle_is_nearer_to_the_full_cache(qkv):
    judged = slice(TOKENS - 512, None)
    full = exact_attention(*qkv, SCALE)[:, :, judged]
    oracle, default = (Layer(*qkv, SCALE, Variant(LAYOUT, oracle=o)).attend()[:, :, judged] for o in (True, False))
    assert (oracle - full).norm() < 0.95 * (default - full).norm()


def test_errors_vanish_with_the_true_mass_and_direction_where_nothing_is_rounded(qkv):
    layer = Layer(*qkv, SCALE, how := Variant(LAYOUT, errors=True))
    layer.packed = [x.clone() for x in qkv[1:]]
    layer.attend()
    (found,) = how.found
    assert found["both"] < 1e-5 < 0.05 < min(found["off"], found["zeroth"], found["true mass"], found["true direction"])
    assert 0 < found["evicted share"] < 1
