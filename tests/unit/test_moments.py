"""Moments against float64 on random and adversarial data, and the correction where it must be exact."""

import math

import pytest
import torch

from momentkv_vllm.moments import Moments, merge, of_tokens, partial


def exact(keys, values):
    """float64 moments of [tokens, d] tensors."""
    k, v = keys.double(), values.double()
    dk, dv = k - k.mean(0), v - v.mean(0)
    return k.mean(0), v.mean(0), dv.square().sum(-1).mean(), dk.T @ dv / len(k)


def close(x, y, tolerance=1e-4):
    scale = y.abs().max().clamp(min=1e-6)
    assert ((x.double() - y).abs().max() / scale) < tolerance


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("head_dim", [1, 32, 80])
@pytest.mark.parametrize("sizes", [(1,), (16, 1, 7), (3, 16, 16, 16, 64), tuple([16] * 200)])
def test_chan_merges_equal_float64(offset, head_dim, sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    keys = torch.randn(sum(sizes), head_dim, generator=generator) + offset
    values = torch.randn(sum(sizes), head_dim, generator=generator) - offset
    total = None
    for k, v in zip(keys.split(sizes), values.split(sizes), strict=True):
        part = of_tokens(k[None, None], v[None, None], torch.ones(1, 1, len(k)), True)
        total = part if total is None else merge(total, part)
    mean_key, mean_value, spread, covariance = exact(keys, values)
    assert total.count.item() == sum(sizes)
    # A large common offset would cost all digits if sums were subtracted; centred merges keep most of them.
    tolerance = 1e-4 if offset == 0 else 2e-3
    close(total.mean_key[0, 0], mean_key)
    close(total.mean_value[0, 0], mean_value)
    if sum(sizes) > 1:
        close(total.value_spread[0, 0], spread, tolerance)
        close(total.covariance[0, 0], covariance, 5e-3 if offset else tolerance)


def test_either_side_may_be_empty_and_is_not_read():
    full = of_tokens(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.ones(1, 2, 5), True)
    nan = torch.full((1, 2, 4), math.nan)
    empty = Moments(torch.zeros(1), nan, nan, nan[..., 0], torch.full((1, 2, 4, 4), math.nan))
    merged = merge(empty, full)
    for name in ("count", "mean_key", "mean_value", "value_spread", "covariance"):
        assert torch.equal(getattr(merged, name), getattr(full, name))
    none = of_tokens(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.zeros(1, 2, 5), True)
    same = merge(full, none)
    assert torch.allclose(same.covariance, full.covariance) and torch.allclose(same.mean_key, full.mean_key)


def attention(query, keys, values, scale):
    weights = torch.softmax(scale * query @ keys.T, -1)
    return weights @ values, torch.logsumexp(scale * query @ keys.T, -1)


def test_identical_keys_are_exact():
    """With one key repeated, Jensen's bound is an equality and the mean value is the answer."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, generator=generator)
    key = torch.randn(1, 8, generator=generator).expand(20, 8)
    values = torch.randn(20, 8, generator=generator)
    m = of_tokens(key[None, None], values[None, None], torch.ones(1, 1, 20), True)
    output, lse = partial(m, query[None, None], 0.3)
    want, want_lse = attention(query, key, values, 0.3)
    assert torch.allclose(output[0, 0], want, atol=1e-5)
    assert torch.allclose(lse[0, 0], want_lse, atol=1e-5)


def test_identical_values_have_zero_covariance_and_an_exact_output():
    generator = torch.Generator().manual_seed(1)
    query, keys = torch.randn(3, 8, generator=generator), torch.randn(20, 8, generator=generator)
    values = torch.randn(1, 8, generator=generator).expand(20, 8)
    m = of_tokens(keys[None, None], values[None, None], torch.ones(1, 1, 20), True)
    output, lse = partial(m, query[None, None], 0.3)
    want, want_lse = attention(query, keys, values, 0.3)
    assert torch.allclose(output[0, 0], want, atol=1e-5)
    assert (lse[0, 0] <= want_lse + 1e-5).all(), "Jensen: never more mass than the truth"


def test_first_order_beats_zeroth_near_the_mean_and_is_bounded_far_away():
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(400, 16, generator=generator), torch.randn(400, 16, generator=generator)
    values = values * 0.3 + keys
    m = of_tokens(keys[None, None], values[None, None], torch.ones(1, 1, 400), True)
    zeroth = Moments(m.count, m.mean_key, m.mean_value, m.value_spread, None)
    near = torch.randn(16, 16, generator=generator) * 0.2
    want, _ = attention(near, keys, values, 1.0)
    error = [(partial(x, near[None, None], 1.0)[0][0, 0] - want).norm() for x in (m, zeroth)]
    assert error[0] < 0.3 * error[1]
    far, _ = partial(m, torch.full((1, 1, 1, 16), 1e4), 1.0)
    assert (far[0, 0, 0] - m.mean_value[0, 0]).norm() <= m.value_spread[0, 0].sqrt() * 1.001


def test_capped_logits_are_exact_to_first_order():
    """Keys that lie close together: what is left of the error shrinks with the square of their distance."""
    generator = torch.Generator().manual_seed(4)
    centre, spread = torch.randn(16, generator=generator), torch.randn(200, 16, generator=generator)
    values, query = torch.randn(200, 16, generator=generator), torch.randn(5, 16, generator=generator)
    values += 3 * spread[:, :1]
    errors = {}
    for distance in (0.1, 0.05):
        keys = centre + distance * (spread - spread.mean(0))
        m = of_tokens(keys[None, None], values[None, None], torch.ones(1, 1, 200), True)
        m.value_spread = m.value_spread * 100  # the limit on steps is not the matter here
        output, lse = partial(m, query[None, None], 0.5, softcap=2.0)
        logits = 2.0 * torch.tanh(0.5 * query @ keys.T / 2.0)
        bare, _ = partial(m, query[None, None], 0.5)
        want = logits.softmax(-1) @ values
        errors[distance] = [(lse[0, 0] - logits.logsumexp(-1)).abs().max(), (output[0, 0] - want).norm()]
        assert errors[distance][1] < 0.3 * (bare[0, 0] - want).norm(), (
            "the step of a logit without a cap is another one"
        )
    for wide, narrow in zip(*errors.values(), strict=True):
        assert narrow < 0.4 * wide


def test_no_evicted_tokens_weigh_nothing():
    m = of_tokens(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.zeros(1, 1, 3), True)
    output, lse = partial(m, torch.randn(1, 1, 2, 4), 1.0)
    assert torch.isinf(lse).all() and (lse < 0).all() and torch.equal(output, torch.zeros_like(output))
