"""Attention sinks of a model (GPT-OSS): a learned logit per head that takes softmax mass and adds no value."""

import torch
from torch import Tensor

from momentkv_vllm.kernels.worklists import AttendWork


def add_sinks(output: Tensor, lse: Tensor, work: AttendWork, sinks: Tensor) -> None:
    """Scale the attention that `attend` wrote by the mass that the sink leaves to it, in place.

    exp(lse) is all mass of the softmax without the sink, so the share left is exp(lse) / (exp(lse) + exp(sink))
    (vllm/model_executor/models/gpt_oss.py; vLLM calls the argument s_aux).

    Args:
        output: [tokens, num_heads, head_dim] as written by `attend`; only the tokens of `work` are touched.
        lse: [tokens, num_heads] float32 likewise; becomes the logsumexp with the sink, which `observe` needs.
        sinks: [num_heads] logits.
    """
    tokens = work.tokens()
    mass = lse[tokens]
    total = torch.logaddexp(mass, sinks.float())
    output[tokens] = (output[tokens] * (mass - total).exp().unsqueeze(-1)).to(output.dtype)
    lse[tokens] = total
