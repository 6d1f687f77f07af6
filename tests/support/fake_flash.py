"""FlashAttention's functions in PyTorch, in vLLM's place for them, where there is no GPU; vLLM imports none here."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends import flash_attn

from momentkv_vllm.attention import cuda_flash

served: list[int] = []
"""Rows of each call."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor,
    scheduler_metadata: Tensor | None, softmax_scale: float, causal: bool, softcap: float, window_size: list[int], **_: Any,
) -> Tensor:  # fmt: skip
    """Causal attention of rows over pages [pages, page_size, kv_heads, head_dim], planned for just these rows."""
    assert causal and not softcap and window_size == [-1, -1] and k.stride(-1) == v.stride(-1) == 1
    assert scheduler_metadata is None or torch.equal(scheduler_metadata, plan(seqused_k)), "the plan of another batch"
    served.append(len(seqused_k))
    page_size, groups = k.shape[1], q.shape[1] // k.shape[2]
    for row, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[row : row + 2].tolist()
        pages = block_table[row, : -(-length // page_size)].long()
        keys, values = (x[pages].flatten(0, 1)[:length].float().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * softmax_scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(length - (end - begin) + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out


def plan(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_tensor([len(lengths)]), lengths]).int()


def install(setattr: Any = setattr) -> None:
    """setattr: pytest's, which takes it back."""
    setattr(flash_attn, "flash_attn_varlen_func", attend)
    setattr(flash_attn, "get_scheduler_metadata", lambda cache_seqlens, **_: plan(cache_seqlens))
    for module in (flash_attn, cuda_flash):
        setattr(module, "get_flash_attn_version", lambda **_: 3)
    served.clear()
