"""What queries have shown of the tokens in a layer's cache: kept by page and slot, moved and cleared along with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from momentkv_vllm.kernels.cache_view import CacheView


@dataclass
class Observed:
    """One layer.

    data: float32 [num_pages, num_kv_heads, page_size]; of logits with a last dimension of 3: count, sum, sum of squares.
    what: "mass", the sum of softmax weights, or "logits".
    """

    data: Tensor
    what: str = "mass"

    @classmethod
    def of(cls, cache: CacheView, what: str, cleared: bool = True) -> "Observed":
        """Of every slot of a cache. cleared False: observation begins by clearing what it will read."""
        shape = [*cache.keys.shape[:3], *[3] * (what == "logits")]
        return cls((torch.zeros if cleared else torch.empty)(shape, device=cache.keys.device), what)

    @property
    def mass(self) -> Tensor | None:
        """What kernels move and clear; None: logits, which PyTorch looks after."""
        return self.data if self.what == "mass" else None

    def fits(self, cache: CacheView) -> bool:
        """Whether it is of this cache."""
        return self.data.shape[:3] == cache.keys.shape[:3] and self.data.device == cache.keys.device

    def of_pages(self, pages: Tensor) -> Tensor:
        """[rows, heads, slots] or [rows, heads, slots, 3] of `pages` [rows, n]."""
        return self.data[pages].transpose(1, 2).flatten(2, 3)
