"""What a model's next-token distributions say about an item, against those of the full cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from momentkv_vllm.calibrate.items import Item

TOP = 512
"""Tokens of the full cache's distribution that KL tells apart; all others count as one event."""


@dataclass
class Reference:
    """The full cache's likeliest tokens of every place: ids and log-probabilities [places, TOP], by item."""

    ids: list[torch.Tensor]
    log_probs: list[torch.Tensor]

    def to_arrays(self) -> list[list[np.ndarray]]:
        return [[x.numpy() for x in tensors] for tensors in (self.ids, self.log_probs)]

    @classmethod
    def from_arrays(cls, arrays: list[list[np.ndarray]]) -> "Reference":
        return cls(*([torch.from_numpy(x) for x in part] for part in arrays))


@dataclass
class Judge:
    """Collects distributions, place by place, in any order; `reference` None: this is the full cache, keep them."""

    items: Sequence[Item]
    reference: Reference | None = None
    _loss: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def empty(*shape: int, value: float = math.nan) -> list[torch.Tensor]:
            return [torch.full((len(item.answer), *shape), value) for item in self.items]

        self._loss, self._right, self._kl = empty(), empty(), empty()
        self._top, self._top_ids = empty(TOP), [x.int() for x in empty(TOP, value=0.0)]

    def take(self, number: int, first: int, logits: torch.Tensor) -> None:
        """Logits [places, vocabulary] of item `number` for the places of its answer from `first` on."""
        item, places = self.items[number], slice(first, first + len(logits))
        log_probs = logits.float().log_softmax(-1)
        right = torch.tensor(item.answer[places], device=logits.device).unsqueeze(-1)
        self._loss[number][places] = -log_probs.gather(-1, right).squeeze(-1)
        self._right[number][places] = (log_probs.argmax(-1) == right.squeeze(-1)).float()
        if self.reference is None:
            self._top[number][places], ids = log_probs.topk(TOP, -1)
            self._top_ids[number][places] = ids.int()
            self._kl[number][places] = 0.0
        else:
            full = self.reference.log_probs[number][places].to(logits.device)
            mine = log_probs.gather(-1, self.reference.ids[number][places].long().to(logits.device))
            self._kl[number][places] = truncated_kl(full, mine)

    def full_cache(self) -> Reference:
        """Raises RuntimeError if places are missing."""
        self.results()
        return Reference(self._top_ids, self._top)

    def results(self) -> list[dict[str, Any]]:
        """By item: `loss`, mean of -log p over the counted places; `found`, whether all of them are likeliest; `kl`, mean over
        all places. Raises RuntimeError if places are missing."""
        found = []
        for number, item in enumerate(self.items):
            loss, kl, counted = self._loss[number], self._kl[number], list(item.counted)
            if loss.isnan().any():
                raise RuntimeError(f"item {number}: {int(loss.isnan().sum())} of {len(loss)} places were never seen")
            right = bool(self._right[number][counted].all())
            found.append({"loss": loss[counted].mean().item(), "found": right, "kl": kl.mean().item()})
        return found


def truncated_kl(full: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """KL(full || mine) [places] from log-probabilities of the same tokens [places, tokens], the rest as one event."""
    full, mine = full.double(), mine.double()
    least = 1e-12
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp(min=least) for x in (full, mine))
    kl = (full.exp() * (full - mine)).sum(-1) + rest_p * (rest_p / rest_q).log()
    return kl.clamp(min=0).float()
