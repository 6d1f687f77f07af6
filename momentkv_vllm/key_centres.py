"""What the keys of a quantised store have in common, per sequence and KV head: they are quantised less it.

Many models give all keys of a head a large part that is the same (Qwen2.5: the biases of its key projections). It says nothing
about a token, yet steps of four bits would have to span it. Less their mean, keys of such models cost no more than others, and
those of models without biases a third less (docs/quality.md). The sequence's first key is unlike all others, and most heads
rest on it (attention sinks): the first tile is centred on that one, which is exact then.

Centres are fixed when the store is first quantised, and lie in the moment record (page_layout.py). The run that holds the
first tile never leaves, so that no other token is read with its centre.
"""

import torch
from torch import Tensor

from momentkv_vllm.packed_store import TILE_TOKENS


def centres_of(keys: Tensor, valid: Tensor) -> Tensor:
    """[rows, heads, 2, head_dim] float32: the first key, the mean of those behind the first tile; what is not finite is 0.

    keys: [rows, heads, tokens, head_dim] float32, the first ones of a sequence. valid: [rows, tokens], False at the end only.
    Sums are of float64, so that every kernel finds the same bits.
    """
    counted = valid & (torch.arange(valid.shape[1], device=valid.device) >= TILE_TOKENS)
    count = counted.sum(1).clamp(min=1).double().view(-1, 1, 1)
    total = torch.where(counted[:, None, :, None], finite(keys), 0.0).sum(2, dtype=torch.float64)
    return torch.stack([finite(keys[:, :, 0]), (total / count).float()], 2)


def sinks(sink_tokens: int, has_centres: bool) -> int:
    """First tokens that never leave: whose tile has the first key's centre are among them."""
    return max(sink_tokens, int(has_centres))


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def of_slots(centres: Tensor, slots: int) -> Tensor:
    """[rows, heads, slots, head_dim]: the centre of every store slot."""
    first = torch.arange(slots, device=centres.device) < TILE_TOKENS
    return torch.where(first.view(1, 1, -1, 1), centres[:, :, :1], centres[:, :, 1:])
