"""What keys are quantised less: the first key for the first tile, the mean of the others for theirs."""

import math

import torch

from momentkv_vllm.key_centres import centres_of, of_slots


def test_centres_are_the_first_key_and_the_mean_behind_the_first_tile():
    keys = torch.randn(2, 3, 40, 16)
    valid = torch.arange(40) < torch.tensor([[40], [20]])
    centres = centres_of(keys, valid)
    assert torch.equal(centres[:, :, 0], keys[:, :, 0])
    for row, end in enumerate((40, 20)):
        mean = keys[row, :, 8:end].double().mean(1)
        torch.testing.assert_close(centres[row, :, 1].double(), mean, atol=1e-7, rtol=1e-7)


def test_what_is_not_finite_does_not_count():
    keys = torch.ones(1, 1, 16, 4)
    keys[0, 0, 0, 1], keys[0, 0, 9, 2], keys[0, 0, 10] = math.nan, -math.inf, math.nan
    first, others = centres_of(keys, torch.ones(1, 16, dtype=torch.bool))[0, 0]
    assert first.tolist() == [1, 0, 1, 1] and others.tolist() == [7 / 8, 7 / 8, 6 / 8, 7 / 8]


def test_slots_of_the_first_tile_have_a_centre_of_their_own():
    of = of_slots(torch.tensor([[[[1.0], [2.0]]]]), 17)
    assert of.flatten().tolist() == [1] * 8 + [2] * 9
