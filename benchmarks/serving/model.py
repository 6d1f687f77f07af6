"""A random-weight Llama of realistic shape, and what one decode step must read."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY = 8, 1024, 16, 4, 2816, 8192
MAX_CONTEXT = 33 * 1024


def make(folder: Path, head_dim: int) -> Path:
    """bfloat16 checkpoint without a tokenizer (skip_tokenizer_init)."""
    path = folder / f"llama-d{head_dim}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=head_dim,
        max_position_embeddings=MAX_CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def weight_bytes(head_dim: int) -> int:
    """Weights that a decode step reads: all but the embedding table."""
    attention = HIDDEN * head_dim * (2 * HEADS + 2 * KV_HEADS)
    return 2 * (LAYERS * (attention + 3 * HIDDEN * MLP) + VOCABULARY * HIDDEN)


def token_bytes(head_dim: int) -> int:
    """KV bytes of one token in all layers."""
    return LAYERS * KV_HEADS * head_dim * 2 * 2
