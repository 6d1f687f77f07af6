"""What of a layer's cache decides whether kernels can serve it, and how a family declares its limits."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """A layer's cache: numbers of a head, tokens of a page, and the type of the numbers."""

    head_size: int
    page_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Limits:
    """What a family can serve. None: anything."""

    head_sizes: range | tuple[int, ...] | None = None
    page_step: int = 1
    dtypes: tuple[torch.dtype, ...] | None = None

    def objections(self, shape: CacheShape) -> list[str]:
        """Why a family with these limits cannot serve such a cache; empty if it can."""
        found = []
        if self.head_sizes is not None and shape.head_size not in self.head_sizes:
            found.append(f"it serves head sizes {_listed(self.head_sizes)}, this model has {shape.head_size}")
        if shape.page_size % self.page_step:
            found.append(f"it serves pages of multiples of {self.page_step} tokens, not of {shape.page_size}")
        if self.dtypes is not None and shape.dtype not in self.dtypes:
            found.append(f"it serves {_listed(self.dtypes)}, the KV cache is {_listed([shape.dtype])}")
        return found


def _listed(values: Iterable) -> str:
    if not isinstance(values, range):
        return ", ".join(str(value).removeprefix("torch.") for value in values)
    step = f"that are multiples of {values.step} " if values.step > 1 else ""
    return f"{step}up to {values[-1]}"
