"""Tasks as token batches for the simulator: equal lengths, the answer at the end."""

import random
from dataclasses import dataclass

import torch
from evaluation.quality.ruler import sample
from evaluation.quality.wording import Compact
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """ids [samples, tokens]: prompt and answer; the last `answer` tokens are the answer."""

    ids: torch.Tensor
    answer: int


def task_batch(
    task: str, tokenizer: PreTrainedTokenizerBase, wording: Compact, length: int, samples: int, seed: int
) -> Batch:
    """`samples` prompts of the test model, each exactly `length` tokens long with its answer."""
    rng = random.Random(f"{task} {seed}")
    rows, answer = [], 0
    while len(rows) < samples:
        one = sample(task, rng, wording, length - 1, lambda text: text.count(" ") + 1)
        words = f"{one.prompt} {one.answer}".split()
        # A task can run out of names: what is missing is haystack before everything else.
        words = wording.text(rng, length)[: length - 1 - len(words)] + words
        rows.append(tokenizer("<s> " + " ".join(words), add_special_tokens=False).input_ids)
        answer = one.answer.count(" ") + 1
    return Batch(torch.tensor(rows), answer)
