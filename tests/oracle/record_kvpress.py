"""Scores of NVIDIA's kvpress for a prompt of the test model. Runs in an environment of its own (tests/oracle/record.sh).

    python tests/oracle/record_kvpress.py CHECKPOINT OUT.safetensors

Writes the token ids and, per press, the score of every candidate, [layers, kv_heads, tokens] float32.
"""

import random
import sys

import torch
from kvpress import KeyDiffPress, KnormPress, SnapKVPress, StreamingLLMPress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

CANDIDATES, WINDOW, KEPT = 512, 32, 128


def recorded(press, model, ids: torch.Tensor) -> torch.Tensor:
    """Scores of every layer while `model` reads `ids`."""
    scores = []
    original = press.score

    def score(*args, **kwargs):
        scores.append(original(*args, **kwargs)[0].float())
        return scores[-1].unsqueeze(0)

    press.score = score
    with torch.no_grad(), press(model):
        model(ids)
    return torch.stack(scores)


def main(checkpoint: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rng = random.Random(0)
    words = len(AutoTokenizer.from_pretrained(checkpoint))
    ids = torch.tensor([[1] + [rng.randrange(4, words) for _ in range(CANDIDATES + WINDOW - 1)]])
    ratio = 1 - KEPT / CANDIDATES
    save_file(
        {
            "ids": ids[0],
            # These see the candidates only: the keys of a prefix do not depend on what follows.
            "knorm": recorded(KnormPress(ratio), model, ids[:, :CANDIDATES]),
            "keydiff": recorded(KeyDiffPress(ratio), model, ids[:, :CANDIDATES]),
            "snapkv": recorded(SnapKVPress(ratio, window_size=WINDOW, kernel_size=5), model, ids)[
                ..., :CANDIDATES
            ].contiguous(),
            "streamingllm": recorded(StreamingLLMPress(1 - 176 / 544, n_sink=4), model, ids),
        },
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
