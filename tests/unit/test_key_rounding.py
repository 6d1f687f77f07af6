"""Errors of keys that are fed back: the same step, less of them where queries look."""

import math

import pytest
import torch

from momentkv_vllm.key_rounding import LEAST, fed_back, feedback_of, shortened
from momentkv_vllm.packed_store import Packed, PackedLayout
from momentkv_vllm.rotation import rotated

HEADS, TOKENS = 2, 400


def queries(head_dim, spread, seed=0):
    """[HEADS, n, head_dim], of whose directions each is `spread` times shorter than the one before."""
    made = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(HEADS, head_dim, head_dim, generator=made))[0]
    return torch.randn(HEADS, 1000, head_dim, generator=made) * spread ** -torch.arange(head_dim) @ turn


def moment_of(q):
    return q.transpose(1, 2) @ q


def error_of(keys, q, layout, feedback):
    """Mean square of what quantising adds to logits."""
    packed = Packed.of(keys, torch.zeros_like(keys), layout, feedback)
    stored = rotated(packed.numbers(layout)[0])[..., : keys.shape[-1]]
    return (q.unsqueeze(0) @ (stored - keys).transpose(-1, -2)).square().mean().item(), packed


@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize(("dtype", "at_most"), [("int4", 0.5), ("int8", 0.5)])
def test_logits_err_less_by_far_in_the_same_bytes(head_dim, dtype, at_most):
    layout, q = PackedLayout(dtype, head_dim), queries(head_dim, 1.15)
    keys = torch.randn(1, HEADS, TOKENS, head_dim, generator=torch.Generator().manual_seed(1))
    feedback = feedback_of(moment_of(q), layout.width)
    nearest, plain = error_of(keys, q, layout, None)
    measured, fed = error_of(keys, q, layout, feedback)
    others, _ = error_of(keys, q[:, :500], layout, feedback)
    assert measured < at_most * nearest and others < at_most * nearest
    assert torch.equal(plain.key_scales, fed.key_scales) and plain.keys.dtype == fed.keys.dtype == torch.uint8


def test_queries_of_all_directions_change_nothing():
    layout = PackedLayout("int4", 64)
    feedback = feedback_of(torch.eye(64).expand(HEADS, 64, 64), layout.width)
    assert feedback.abs().max() < 1e-6
    keys = torch.randn(1, HEADS, 40, 64)
    one, two = (Packed.of(keys, keys, layout, given) for given in (None, torch.zeros(HEADS, 64, 64)))
    assert torch.equal(one.keys, two.keys)


def test_the_bracket_of_every_number_is_within_half_a_step():
    """e_i + sum of M_ij e_j: but for numbers at the end of their scale, and 16 bits of an error."""
    width, levels = 64, 254
    feedback = feedback_of(moment_of(queries(width, 1.05)), width)
    x = torch.randn(1, HEADS, TOKENS, width)
    scale = torch.full_like(x, 2**-4).bfloat16()
    error = (fed_back(x, scale, feedback, levels) + 0.5) * 2**-4 - x
    bracket = error + torch.einsum("hji,bhtj->bhti", feedback, error)
    assert bracket.abs().max() <= 0.5001 * 2**-4


def test_what_nobody_asked_for_counts_a_little():
    """One query alone says nothing of other directions; a moment of zeros nothing at all."""
    one = torch.zeros(1, 64, 64)
    assert not feedback_of(one, 64).any()
    one[0, 0, 0] = 1.0
    found = feedback_of(one, 64)
    assert found.isfinite().all() and found.abs().max() <= 1 and LEAST > 0


def test_numbers_that_are_not_finite_stay_by_themselves():
    layout, feedback = PackedLayout("int4", 64), feedback_of(moment_of(queries(64, 1.1)), 64)
    keys = torch.randn(1, HEADS, 3, 64)
    keys[0, 0, 1] = math.nan
    keys[0, 1, 2] = math.inf
    packed = Packed.of(keys, torch.zeros_like(keys), layout, feedback)
    alone = Packed.of(keys[:, :, :1], torch.zeros_like(keys[:, :, :1]), layout, feedback)
    assert torch.equal(packed.keys[:, :, :1], alone.keys) and packed.key_scales[0, 0, 1].isnan().all()
    assert shortened(torch.tensor([math.nan, math.inf, -math.inf])).tolist() == [0.0, 0.0, 0.0]
    x = torch.randn(1000)
    assert ((shortened(x) - x).abs() <= x.abs() * 2**-15).all()
