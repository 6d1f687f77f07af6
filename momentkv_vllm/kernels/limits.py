"""What of a layer's cache decides whether kernels can serve it, and how a family declares its limits."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """A layer's cache: numbers of a head, tokens of a page, and the type of the numbers; how its store is quantised ("" where it
    is not), how many neighbours compete for it together, and where the layer caps its logits (0: nowhere)."""

    head_size: int
    page_size: int
    dtype: torch.dtype
    store_dtype: str = ""
    run_tokens: int = 1
    softcap: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a family can serve. None: anything."""

    head_sizes: range | tuple[int, ...] | None = None
    page_step: int = 1
    dtypes: tuple[torch.dtype, ...] | None = None
    stores: bool = True
    """Quantised ones, and stores that keep runs of neighbours."""
    softcaps: bool = True

    def objections(self, shape: CacheShape) -> list[str]:
        """Why a family with these limits cannot serve such a cache; empty if it can."""
        found = []
        if self.head_sizes is not None and shape.head_size not in self.head_sizes:
            found.append(f"it serves head sizes {_listed(self.head_sizes)}, this model has {shape.head_size}")
        if shape.page_size % self.page_step:
            found.append(f"it serves pages of multiples of {self.page_step} tokens, not of {shape.page_size}")
        if self.dtypes is not None and shape.dtype not in self.dtypes:
            found.append(f"it serves {_listed(self.dtypes)}, the KV cache is {_listed([shape.dtype])}")
        if not self.stores and shape.store_dtype:
            found.append(f"it knows no store of {shape.store_dtype} yet, only store_dtype 'model'")
        if not self.stores and shape.run_tokens > 1:
            found.append(f"it knows no runs of {shape.run_tokens} tokens yet, only run_tokens 1")
        if not self.softcaps and shape.softcap:
            found.append(f"it knows no logit soft-capping yet, this model caps its logits at {shape.softcap:g}")
        return found


def _listed(values: Iterable) -> str:
    if not isinstance(values, range):
        return ", ".join(str(value).removeprefix("torch.") for value in values)
    step = f"that are multiples of {values.step} " if values.step > 1 else ""
    return f"{step}up to {values[-1]}"
