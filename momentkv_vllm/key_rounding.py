"""Errors of quantised keys go where queries do not look.

A query q sees the error e of a key as q . e. Queries of a head lie mostly in few directions, so not all errors cost the same: in
the mean e^T H e, where H is the second moment of queries. Numbers of a key are quantised one after the other, and what one has
lost is made up for by those that follow, as GPTQ does with weights (Frantar et al., arXiv 2210.17323) and QuIP calls LDLQ
(Chee et al., arXiv 2307.13304). No bit more is kept, and whoever reads a code reads it as before.

With H = M^T D M, M unit upper triangular, e^T H e is the sum over numbers of
D_i (e_i + sum over j > i of M_ij e_j)^2. From the last number on, each is rounded where that bracket is small.
"""

import torch
from torch import Tensor

from momentkv_vllm.rotation import rotated

LEAST = 0.3
"""Share of the mean square that every direction gets: directions of which the measured queries said nothing."""


def moment_of(query: Tensor, kv_heads: int) -> Tensor:
    """[kv_heads, head_dim, head_dim] float32, sum of q q^T over a KV head's queries [tokens, num_heads, head_dim]."""
    of_heads = query.float().unflatten(1, (kv_heads, -1)).movedim(0, 2).flatten(1, 2)
    return of_heads.transpose(1, 2) @ of_heads


def feedback_of(moment: Tensor, width: int) -> Tensor:
    """What errors of a head's keys add to the numbers before them.

    Args:
        moment: [heads, head_dim, head_dim], as `moment_of` gives it.
        width: of a padded key (packed_store.py).

    Returns:
        [heads, width, width] float32, row j for the error of number j of rotated keys: M_ij for i < j, else 0. They have the 8
        significant bits of bfloat16 (`fed_back` says why).
    """
    d = moment.shape[-1]
    moment = moment.double()
    wide = torch.nn.functional.pad(moment, (0, width - d, 0, width - d)).float()
    turned = rotated(rotated(wide).transpose(-1, -2)).double()
    mean = moment.diagonal(dim1=-2, dim2=-1).sum(-1) / d
    eye = torch.eye(width, dtype=torch.float64)
    known = (turned + turned.transpose(-1, -2)) / 2 + (LEAST * mean).clamp(min=1e-30).view(-1, 1, 1) * eye
    lower = torch.linalg.cholesky(known)
    unit = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return unit.tril(-1).to(torch.bfloat16).float().contiguous()


def fed_back(x: Tensor, scale: Tensor, feedback: Tensor, levels: int) -> Tensor:
    """Codes -levels / 2 .. levels / 2 - 1 of rotated keys, each rounded down from what errors behind it leave of its number.

    Every product has at most 24 significant bits: a kernel that fuses it with the sum next to it finds the same bits.

    Args:
        x: [rows, heads, tokens, width] float32.
        scale: bfloat16 of every number, like `x`.
        feedback: as `feedback_of` gives it.
    """
    wide, left, codes = scale.float(), x.clone(), torch.empty_like(x)
    inverse = torch.where(wide > 0, 1 / wide, 0.0)
    for j in range(x.shape[-1] - 1, -1, -1):
        code = (left[..., j] * inverse[..., j]).floor().nan_to_num(nan=0.0).clamp(-levels // 2, levels // 2 - 1)
        error = shortened((code + 0.5) * wide[..., j] - x[..., j])
        codes[..., j] = code
        left[..., :j] -= feedback[:, None, j, :j] * error.unsqueeze(-1)
    return codes


def shortened(x: Tensor) -> Tensor:
    """float32 numbers with their first 16 significant bits; 0 for those that are not finite."""
    short = (x.contiguous().view(torch.int32) & -0x100).view(torch.float32)
    return torch.where(x.isfinite(), short, 0.0)
