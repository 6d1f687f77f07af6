"""A random-weight Llama of realistic shape, and what one decode step must read."""

from pathlib import Path

import random_llama

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY = 8, 1024, 16, 4, 2816, 8192
MAX_CONTEXT = 33 * 1024
POOL_TOKENS, POOL_PROMPT, POOL_NEW, POOL_REQUESTS = 16384, 2048, 256, 96


def make(folder: Path, head_dim: int) -> Path:
    """bfloat16 checkpoint without a tokenizer (skip_tokenizer_init)."""
    return random_llama.make(
        folder / f"llama-d{head_dim}", words=VOCABULARY, hidden=HIDDEN, mlp=MLP, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS,
        head_dim=head_dim, context=MAX_CONTEXT,
    )  # fmt: skip


def weight_bytes(head_dim: int) -> int:
    """Weights that a decode step reads: all but the embedding table."""
    attention = HIDDEN * head_dim * (2 * HEADS + 2 * KV_HEADS)
    return 2 * (LAYERS * (attention + 3 * HIDDEN * MLP) + VOCABULARY * HIDDEN)


def token_bytes(head_dim: int) -> int:
    """KV bytes of one token in all layers."""
    return LAYERS * KV_HEADS * head_dim * 2 * 2
