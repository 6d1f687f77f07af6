"""Answers of engines whose heads have budgets of their own, by the CPU kernels and by Triton's in its interpreter, and of one whose
heads all hold as much: `interpreted_engine.py MODEL` prints them as JSON. Run with TRITON_INTERPRET=1."""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # -P leaves it out
from engine import Engine, random_prompt
from measured_heads import capacities

from momentkv_vllm.attention import measuring

OURS = {
    "policy": "momentkv", "budget_tokens": 64, "store_dtype": "int8", "prefill": "auto", "block_size": 16,
    "max_num_batched_tokens": 128,
}  # fmt: skip
REACH = [[0.05, 0.6], [0.1, 1.0]]
"""Heads of random weights look alike."""


def main(model: str) -> None:
    """Prompts below the budget, read in one exact piece whose first event takes lent tiles, and read in steps."""
    share_out, found = measuring.share_out, {}
    measuring.share_out = lambda runner, seen: share_out(runner, dict(zip(seen, torch.tensor(REACH), strict=True)))
    prompts = [random_prompt(n) for n in (40, 230, 330)]
    for kernels, heads in (("cpu", "measured"), ("triton", "measured"), ("cpu", "equal")):
        engine = Engine(Path(model), **OURS, kernels=kernels, head_budgets=heads)
        found[f"{kernels}, {heads}"] = {"held": capacities(engine), "answers": engine.generate(prompts, max_tokens=20)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
