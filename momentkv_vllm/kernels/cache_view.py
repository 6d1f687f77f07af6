"""Typed views of one layer's KV cache: tokens by page and slot, moment records by page.

The only place that knows how bytes lie in vLLM's cache tensor; kernels see shapes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from momentkv_vllm import records
from momentkv_vllm.fp8 import is_fp8, truncated
from momentkv_vllm.head_budgets import HeadBudgets
from momentkv_vllm.key_centres import sinks
from momentkv_vllm.moments import Moments
from momentkv_vllm.packed_store import PackedLayout, PackedPages
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.rotation import rotated_block


@dataclass
class CacheView:
    """One layer.

    keys, values: [num_pages, num_kv_heads, page_size, head_dim] strided views of the cache.
    kv:           the cache tensor itself, [num_pages, num_kv_heads, page_size, 2 * head_dim].
    raw:          [num_pages, num_kv_heads, bytes a head owns of a page] uint8 view of the same memory.
    record_layout: layout of a moment record.
    packed_layout: how store pages are quantised; None: they are pages as any other.
    heads: what each head holds of a quantised store; None: all as much, each in its own part of the pages.
    feedback:     of errors in keys of a quantised store (key_rounding.py); None: numbers are rounded by themselves.
    softcap:      the layer caps its logits there (softcap.py); 0: it does not.
    key_scale, value_scale: what numbers of fp8 are to be multiplied by (fp8.py); else 1.
    """

    keys: Tensor
    values: Tensor
    kv: Tensor
    raw: Tensor
    record_layout: RecordLayout
    packed_layout: PackedLayout | None = None
    softcap: float = 0.0
    heads: HeadBudgets | None = None
    feedback: Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    @classmethod
    def of_vllm_cpu(
        cls,
        kv_cache: Tensor,
        record_layout: RecordLayout,
        packed_layout: PackedLayout | None = None,
        softcap: float = 0.0,
    ) -> "CacheView":
        """View vLLM's CPU cache (vllm/v1/attention/backends/cpu_attn.py, x86 instruction sets "vec" and "vec16").

        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim]. A head's part of a page is page_size * head_dim
        key numbers stored dimension-major, then as many value numbers stored token-major. The start-up self-check
        (attention/self_check.py) proves this against vLLM's own store before the first request.
        """
        pages, num_heads, page_size, width = kv_cache.shape
        head_dim = width // 2
        halves = kv_cache.view(pages, num_heads, 2, page_size * head_dim)
        keys = halves[:, :, 0].view(pages, num_heads, head_dim, page_size).transpose(-1, -2)
        values = halves[:, :, 1].view(pages, num_heads, page_size, head_dim)
        raw = kv_cache.view(pages, num_heads, -1).view(torch.uint8)
        return cls(keys, values, kv_cache, raw, record_layout, packed_layout, softcap)

    @classmethod
    def of_vllm_gpu(
        cls,
        kv_cache: Tensor,
        record_layout: RecordLayout,
        packed_layout: PackedLayout | None = None,
        softcap: float = 0.0,
    ) -> "CacheView":
        """View the cache of vLLM's Triton and FlashAttention backends (vllm/v1/attention/backends/triton_attn.py).

        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], a slot's key and then its value; a head's part of a page
        must be contiguous (vLLM's layouts that end in "NC"). Raises ValueError otherwise.
        """
        head_dim = kv_cache.shape[3] // 2
        if kv_cache.stride()[2:] != (2 * head_dim, 1):
            raise ValueError(
                f"--kv-eviction needs a KV cache in which a head's part of a page is contiguous (layout LBHNC), this one has "
                f"the strides {kv_cache.stride()} for the shape {tuple(kv_cache.shape)}"
            )
        keys, values = kv_cache[..., :head_dim], kv_cache[..., head_dim:]
        raw = kv_cache.flatten(2).view(torch.uint8)
        return cls(keys, values, kv_cache, raw, record_layout, packed_layout, softcap)

    def corrected_by(self, correction: str) -> "CacheView":
        """As attention reads it: a covariance that only the score reads is no part of a "zeroth" correction. The means lie where
        they lie."""
        if correction == "first" or not self.record_layout.has_covariance:
            return self
        return replace(self, record_layout=replace(self.record_layout, has_covariance=False))

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @cached_property
    def packed(self) -> PackedPages | None:
        """The same pages as quantised store pages."""
        return PackedPages(self.raw, self.packed_layout) if self.packed_layout else None

    @property
    def page_slots(self) -> int:
        """Most tokens of a page, of whatever kind."""
        return max(self.page_size, self.packed.page_tokens if self.packed else 0)

    @property
    def cache_arguments(self) -> tuple[Tensor, float, float]:
        """What operators in C++ are told of the cache."""
        return self.kv, self.key_scale, self.value_scale

    @cached_property
    def record_arguments(self) -> tuple[bool | torch.dtype | int, ...]:
        """What operators in C++ and CUDA are told of records: the order of their arguments stands here."""
        layout = self.record_layout
        return layout.has_means, layout.has_covariance, records.covariance_dtype(layout), *layout.offsets

    @cached_property
    def packed_arguments(self) -> list[int]:
        """What operators in C++ are told of quantised store pages (csrc/common/params.h); empty if there are none."""
        layout = self.packed_layout
        if layout is None or self.packed is None:
            return []
        sizes = [layout.code_bytes, layout.values_offset, layout.scales_offset, layout.tile_bytes]
        return [layout.bits, layout.width, rotated_block(layout.width), *sizes, self.packed.page_tiles, self.centres_at]

    @property
    def centres_at(self) -> int:
        """Byte of a record where the centres of a quantised store's keys begin; -1: keys have none."""
        return self.record_layout.start if self.record_layout.has_centres else -1

    @property
    def head_arguments(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """What operators in C++ are told of heads with budgets of their own."""
        heads = self.heads
        return (None, None, 0, 0) if heads is None else (heads.places, heads.capacity, heads.equal_tokens, heads.pages)

    def sinks(self, sink_tokens: int) -> int:
        """First tokens that never leave (key_centres.py)."""
        return sinks(sink_tokens, self.record_layout.has_centres)

    def evicted(self, stored: Tensor | None, num_evicted: Tensor) -> Tensor:
        """Tokens that heads have evicted, [rows, heads] where they have budgets of their own, else `num_evicted` [rows]."""
        return num_evicted if self.heads is None else self.heads.evicted(stored, num_evicted)

    def store_slots(self, store_pages: int) -> int:
        """Most slots of a head in a quantised store of so many pages."""
        return store_pages * self.packed.page_tokens if self.heads is None else self.heads.most_tokens

    def read_tokens(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `pages` [rows, n] as float32 (keys, values) [rows, heads, n * page_size, head_dim]."""
        return _flatten(self.keys[pages]) * self.key_scale, _flatten(self.values[pages]) * self.value_scale

    def as_stored(self, x: Tensor, scale: float) -> Tensor:
        """New numbers in the cache's dtype; `scale`: that of keys or of values."""
        return truncated(x, scale, self.kv.dtype) if is_fp8(self.kv.dtype) else x

    def write_tokens(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Inverse of `read_tokens`, of fp8 too: rounded to nearest, a number that was read is found again."""
        self.keys[pages] = _unflatten(keys / self.key_scale, self.page_size).to(self.keys.dtype)
        self.values[pages] = _unflatten(values / self.value_scale, self.page_size).to(self.values.dtype)

    def read_moments(self, pages: Tensor, num_evicted: Tensor) -> Moments:
        """Records in moment pages [rows, M]; rows that evicted nothing give zeros: the first page of a new record is a page of
        tokens."""
        return records.decoded(self._records(pages), self.record_layout, num_evicted)

    def read_centres(self, pages: Tensor) -> Tensor:
        """Centres in record pages [rows, M], [rows, heads, 2, head_dim] float32 (key_centres.py)."""
        raw = self._records(pages)[..., self._centre_bytes]
        return raw.contiguous().view(torch.float32).unflatten(2, (2, -1))

    def write_centres(self, pages: Tensor, centres: Tensor) -> None:
        """Inverse of `read_centres`."""
        record = self._records(pages)
        record[..., self._centre_bytes] = centres.flatten(2).contiguous().view(torch.uint8)
        self._write_records(pages, record)

    def write_moments(self, pages: Tensor, moments: Moments) -> None:
        """Store records into moment pages [rows, M]."""
        if self.record_layout.has_means:
            record = self._records(pages)
            records.encode(moments, self.record_layout, record)
            self._write_records(pages, record)

    @property
    def _centre_bytes(self) -> slice:
        return slice(self.centres_at, self.centres_at + 2 * torch.float32.itemsize * self.keys.shape[3])

    def _records(self, pages: Tensor) -> Tensor:
        """A copy of what heads own of record pages [rows, M], [rows, heads, bytes]."""
        return self.raw[pages].transpose(1, 2).flatten(2)

    def _write_records(self, pages: Tensor, record: Tensor) -> None:
        """Inverse of `_records`."""
        self.raw[pages] = record.unflatten(2, (pages.shape[1], -1)).transpose(1, 2)


def _flatten(pages: Tensor) -> Tensor:
    rows, n, heads, page_size, head_dim = pages.shape
    return pages.permute(0, 2, 1, 3, 4).reshape(rows, heads, n * page_size, head_dim).float()


def _unflatten(tokens: Tensor, page_size: int) -> Tensor:
    rows, heads, _, head_dim = tokens.shape
    return tokens.view(rows, heads, -1, page_size, head_dim).permute(0, 2, 1, 3, 4)
