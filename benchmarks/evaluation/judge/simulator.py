"""The judge's items in the simulator: many sequences at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from research.simulate import Eviction, Rounded, SimulatedModel

from momentkv_vllm.calibrate.items import Item
from momentkv_vllm.calibrate.verdict import Judge

MAX_TOKENS = 16384
"""Tokens of one forward pass: bounds memory."""

How = Callable[[int], Eviction | Rounded | None]
"""By the length of the prompt."""


class Simulator:
    def __init__(self, model: Path | str) -> None:
        self.model = SimulatedModel(model)

    @property
    def head_dim(self) -> int:
        return self.model.model.config.head_dim

    @torch.no_grad()
    def ask(self, items: Sequence[Item], judge: Judge, how: How) -> None:
        """Everything about `items` to `judge`."""
        by_length: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            by_length.setdefault(len(item.prompt), []).append(number)
        for prompt, numbers in by_length.items():
            tokens = prompt + max(len(items[n].answer) for n in numbers) - 1
            size = max(1, MAX_TOKENS // tokens)
            for at in range(0, len(numbers), size):
                self._together(items, numbers[at : at + size], judge, prompt, how(prompt))

    def _together(
        self, items: Sequence[Item], numbers: Sequence[int], judge: Judge, prompt: int, how: Eviction | Rounded | None
    ) -> None:
        """Items with prompts of one length. Shorter answers are padded; nothing looks at what comes after them."""
        rows = [[*items[n].prompt, *items[n].answer[:-1]] for n in numbers]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        hidden = self.model.hidden(ids, how)
        for number, row, states in zip(numbers, rows, hidden, strict=True):
            judge.take(number, 0, self.model.model.lm_head(states[prompt - 1 : len(row)]))
