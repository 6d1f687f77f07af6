"""Typed views of one layer's KV cache: tokens by page and slot, moment records by page.

The only place that knows how bytes lie in vLLM's cache tensor; kernels see shapes.
"""

from dataclasses import dataclass

import torch

from momentkv_vllm.moments import Moments
from momentkv_vllm.page_layout import RecordLayout


@dataclass
class CacheView:
    """One layer.

    keys, values: [num_pages, num_kv_heads, page_size, head_dim] strided views of the cache.
    kv:           the cache tensor itself, [num_pages, num_kv_heads, page_size, 2 * head_dim].
    raw:          [num_pages, num_kv_heads, bytes a head owns of a page] uint8 view of the same memory.
    record:       layout of a moment record.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kv: torch.Tensor
    raw: torch.Tensor
    record: RecordLayout

    @classmethod
    def of_vllm_cpu(cls, kv_cache: torch.Tensor, record: RecordLayout) -> "CacheView":
        """View vLLM's CPU cache (vllm/v1/attention/backends/cpu_attn.py, x86 instruction sets "vec" and "vec16").

        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim]. A head's part of a page is page_size * head_dim
        key numbers stored dimension-major, then as many value numbers stored token-major. The start-up self-check
        (attention/self_check.py) proves this against vLLM's own store before the first request.
        """
        pages, heads, page_size, width = kv_cache.shape
        head_dim = width // 2
        halves = kv_cache.view(pages, heads, 2, page_size * head_dim)
        return cls(
            keys=halves[:, :, 0].view(pages, heads, head_dim, page_size).transpose(-1, -2),
            values=halves[:, :, 1].view(pages, heads, page_size, head_dim),
            kv=kv_cache,
            raw=kv_cache.view(pages, heads, page_size * width).view(torch.uint8),
            record=record,
        )

    @classmethod
    def of_vllm_gpu(cls, kv_cache: torch.Tensor, record: RecordLayout) -> "CacheView":
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
        return cls(
            keys=kv_cache[..., :head_dim],
            values=kv_cache[..., head_dim:],
            kv=kv_cache,
            raw=kv_cache.flatten(2).view(torch.uint8),
            record=record,
        )

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def covariance(self) -> tuple[bool, torch.dtype, int]:
        """Whether records have one, its type, and the byte of a record at which it begins: what native kernels are told."""
        return self.record.has_covariance, self._covariance_dtype, self.record.header_bytes

    def read_tokens(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of `pages` [rows, n] as float32 (keys, values) [rows, heads, n * page_size, head_dim]."""
        return _flatten(self.keys[pages]), _flatten(self.values[pages])

    def write_tokens(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Inverse of `read_tokens`."""
        self.keys[pages] = _unflatten(keys, self.page_size).to(self.keys.dtype)
        self.values[pages] = _unflatten(values, self.page_size).to(self.values.dtype)

    def read_moments(self, pages: torch.Tensor, count: torch.Tensor) -> Moments:
        """Records in moment pages [rows, M] as float32; `count` [rows] comes from the schedule. Missing parts are zero.

        Rows with count 0 return zeros, whatever their pages hold: the first page of a new record is a page of tokens.
        """
        rows, heads, d = pages.shape[0], self.raw.shape[1], self.record.head_dim
        if not self.record.has_means:
            zeros = self.keys.new_zeros(rows, heads, d, dtype=torch.float32)
            return Moments(count, zeros, zeros, zeros[..., 0], None)
        raw = self.raw[pages].permute(0, 2, 1, 3).reshape(rows, heads, -1)
        raw = torch.where((count == 0)[:, None, None], raw.new_zeros(()), raw)
        header_bytes = self.record.header_bytes
        header = raw[..., : header_bytes // 4 * 4].contiguous().view(torch.float32)
        covariance = None
        if self.record.has_covariance:
            stored = raw[..., header_bytes : self.record.num_bytes].contiguous().view(self._covariance_dtype)
            covariance = stored.view(rows, heads, d, d).float()
        if self.record.has_scales:
            covariance = covariance * header[..., 2 * d + 1 : 3 * d + 1].unsqueeze(-1)
        return Moments(count, header[..., :d], header[..., d : 2 * d], header[..., 2 * d], covariance)

    def write_moments(self, pages: torch.Tensor, moments: Moments) -> None:
        """Store records into moment pages [rows, M]."""
        if not self.record.has_means:
            return
        rows, heads = moments.mean_key.shape[:2]
        header, covariance = (
            [moments.mean_key, moments.mean_value, moments.value_spread.unsqueeze(-1)],
            moments.covariance,
        )
        if self.record.has_scales:
            scales = covariance.abs().amax(-1) / 127
            covariance = (covariance / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
            header.append(scales)
        parts = [torch.cat(header, -1).view(torch.uint8)]
        parts.append(parts[0].new_zeros(rows, heads, self.record.header_bytes - parts[0].shape[-1]))
        if self.record.has_covariance:
            stored = covariance.flatten(2).to(self._covariance_dtype)
            parts.append(stored.contiguous().view(torch.uint8))
        room = pages.shape[1] * self.raw.shape[2] - self.record.num_bytes
        parts.append(self.raw.new_zeros(rows, heads, room))
        record = torch.cat(parts, -1).view(rows, heads, pages.shape[1], -1)
        self.raw[pages] = record.permute(0, 2, 1, 3)

    @property
    def _covariance_dtype(self) -> torch.dtype:
        return getattr(torch, self.record.moment_dtype)


def _flatten(pages: torch.Tensor) -> torch.Tensor:
    rows, n, heads, page_size, head_dim = pages.shape
    return pages.permute(0, 2, 1, 3, 4).reshape(rows, heads, n * page_size, head_dim).float()


def _unflatten(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    rows, heads, _, head_dim = tokens.shape
    return tokens.view(rows, heads, -1, page_size, head_dim).permute(0, 2, 1, 3, 4)
