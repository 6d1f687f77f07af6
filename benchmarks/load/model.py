"""What the load is made of: a random-weight Llama with the word tokenizer of the test model, and prompts."""

import json
import random
import shutil
from pathlib import Path

import torch
from quality.wording import Compact
from transformers import LlamaConfig, LlamaForCausalLM

TEST_MODEL = Path(__file__).parent.parent / "test_model/checkpoint"
PROMPT_TOKENS, NEW_TOKENS = 512, 256


def make(folder: Path) -> Path:
    """bfloat16 checkpoint of 50 M parameters with a tokenizer, one word a token."""
    path = folder / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(Compact.WORDS), hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEST_MODEL / name, path)
    return path


def prompts(folder: Path, count: int, seed: int = 0) -> Path:
    """JSON lines that both clients read; all prompts differ from their first word on."""
    rng = random.Random(seed)
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for _ in range(count):
            row = {"prompt": " ".join(rng.choices(Compact.TOPIC, k=PROMPT_TOKENS - 1))}
            row |= {
                "prompt_tokens_count": PROMPT_TOKENS,
                "output_tokens_count": NEW_TOKENS,
                "output_tokens": NEW_TOKENS,
            }
            file.write(json.dumps(row) + "\n")
    return path
