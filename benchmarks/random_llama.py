"""Llamas of random weights in bfloat16, for benchmarks that ask how fast or how much, never what."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make(
    folder: Path,
    *,
    words: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
) -> Path:
    """A checkpoint without a tokenizer in `folder`, unless it is there. words: of the vocabulary; context: most tokens."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=words, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=context, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
