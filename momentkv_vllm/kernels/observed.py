"""What queries have shown of the tokens in a layer's cache: kept by page and slot, moved and cleared along with them."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from momentkv_vllm.kernels.cache_view import CacheView


@dataclass
class Observed:
    """One layer.

    data: float32, of "mass" [num_pages, num_kv_heads, slots of a page], the sum of softmax weights; of "logits" with a last
          dimension of 3: their count, sum and sum of squares.
    what: "mass" or "logits".
    """

    data: Tensor
    what: str = "mass"

    @classmethod
    def of(cls, cache: CacheView, what: str, cleared: bool = True) -> "Observed":
        """Of every slot of a cache. cleared False: observation begins by clearing what it will read."""
        shape = [*cache.keys.shape[:2], *_per_head(cache.page_slots, what)]
        return cls((torch.zeros if cleared else torch.empty)(shape, device=cache.keys.device), what)

    @property
    def mass(self) -> Tensor | None:
        """What kernels move and clear; None: logits, which PyTorch looks after."""
        return self.data if self.what == "mass" else None

    def fits(self, cache: CacheView) -> bool:
        """Whether it is of this cache."""
        return self.data.shape[:2] == cache.keys.shape[:2] and self.data.device == cache.keys.device

    def of_pages(self, pages: Tensor, page_tokens: int) -> Tensor:
        """[rows, heads, n * page_tokens] (of logits with the last dimension of 3) of `pages` [rows, n]."""
        return self.data[pages][:, :, :, :page_tokens].transpose(1, 2).flatten(2, 3)


def page_bytes(heads: int, slots: int, what: str) -> int:
    """What is kept of a page's tokens in one layer."""
    return heads * prod(_per_head(slots, what)) * torch.float32.itemsize


def _per_head(slots: int, what: str) -> list[int]:
    return [slots, *[3] * (what == "logits")]
