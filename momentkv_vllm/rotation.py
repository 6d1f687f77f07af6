"""The rotation of quantised keys and values."""

import torch


def rotated(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of the last dimension, orthonormal and its own inverse; float32.

    It spreads a large channel over all others, so that one scale serves a whole token. A dimension that is no power of two is
    transformed in blocks of its largest power of two. Butterflies of halves 1, 2, 4, ... and one product at the end: every
    kernel that quantises does the same additions, so codes agree bit by bit.
    """
    shape, block = x.shape, rotated_block(x.shape[-1])
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(-1, block)
        half *= 2
    return (x * block**-0.5).view(shape)


def rotated_block(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`."""
    return head_dim & -head_dim
