"""What the load is made of: a random-weight Llama with the word tokenizer of the test model, and prompts."""

import json
import random
import shutil
from pathlib import Path

import random_llama
from evaluation.quality.wording import Compact

TEST_MODEL = Path(__file__).parent.parent / "test_model/checkpoint"
PROMPT_TOKENS, NEW_TOKENS = 512, 256


def make(folder: Path) -> Path:
    """bfloat16 checkpoint of 50 M parameters with a tokenizer, one word a token."""
    path = random_llama.make(
        folder / "model",
        words=len(Compact.WORDS),
        hidden=768,
        mlp=2048,
        layers=8,
        heads=12,
        kv_heads=4,
        head_dim=64,
        context=4096,
    )
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
