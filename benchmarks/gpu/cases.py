"""Caches and work lists for checks and timings: the layout of vLLM's GPU cache, pages scattered, what is not written NaN."""

import math
from dataclasses import dataclass

import shape
import torch

from momentkv_vllm import moments
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork


@dataclass(frozen=True)
class Shape(shape.Shape):
    """One step of a layer in vLLM's GPU cache. odd: row i has i retained tokens fewer than `slots`."""

    kv_heads: int = 8
    record: str = "bfloat16"
    odd: bool = False

    @property
    def label(self) -> str:
        return (
            f"{self.step}, {self.rows} x {self.slots}, d={self.head_dim}, {self.groups} queries a KV head, "
            f"pages of {self.page_size}, {str(self.dtype).removeprefix('torch.')}, record {self.record}"
        )


class Case:
    """Random tokens and records of a shape on a device."""

    def __init__(self, s: Shape, device: str) -> None:
        self.shape, self.device = s, device
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        total, self.pages, self.moment_pages = s.deal_pages(generator)
        kv = torch.empty(total, s.kv_heads, s.page_size, 2 * s.head_dim, dtype=s.dtype, device=device)
        # In parts: a 128K context in float32 would need as much memory again.
        for part in kv.split(4096):
            part.copy_(normal(*part.shape))
        kv[0] = math.nan
        self.cache = CacheView.of_vllm_gpu(kv, s.layout)
        ends = torch.full((s.rows,), s.slots, device=device)
        if s.odd:
            ends -= torch.arange(s.rows, device=device) % min(s.page_size, s.slots - s.queries + 1)
        for row, end in enumerate(ends.tolist()):
            if end % s.page_size:
                kv[self.pages[row, end // s.page_size], :, end % s.page_size :] = math.nan
        gone = (normal(s.rows, s.kv_heads, 64, s.head_dim) for _ in range(2))
        ones = torch.ones(s.rows, s.kv_heads, 64, device=device)
        self.cache.write_moments(self.moment_pages, moments.of_tokens(*gone, ones, s.layout.has_covariance))
        count = torch.full((s.rows,), 10_000.0, device=device)
        if s.odd:
            count[::3] = 0  # empty records
        every = torch.arange(s.rows, device=device)
        self.work = AttendWork(
            first_token=every * s.queries,
            num_queries=torch.full_like(every, s.queries),
            pages=self.pages,
            last_slot=ends - s.queries,
            moment_pages=self.moment_pages,
            num_evicted=count,
            observe_from=every * 0,
            restart=every % 2 == 0,
            most_queries=s.queries,
        )
        heads = s.kv_heads * s.groups
        self.query = normal(s.rows * s.queries, heads, s.head_dim).to(s.dtype)
        self.key, self.value = (normal(s.rows, s.kv_heads, s.head_dim).to(s.dtype) for _ in range(2))
        self.output = torch.empty_like(self.query)
        self.lse = torch.empty(*self.query.shape[:2], device=device)
        self.mass = Observed(torch.rand(total, s.kv_heads, s.page_size, generator=generator, device=device))
        self.scale = s.head_dim**-0.5

    def attend(self, family, corrected: bool, lse: bool = False) -> None:
        family.attend(self.cache, self.query, self.output, self.lse if lse else None, self.work, self.scale, corrected)

    def retire_work(self, retire_pages: int, due: bool = True) -> RetireWork:
        """An event of every row, or of none: all pages but the newest `retire_pages` + 1 are the store."""
        store, retiring, _ = (x.contiguous() for x in self.pages.tensor_split([-1 - retire_pages, -1], 1))
        retiring = retiring if due else torch.full_like(retiring, -1)
        return RetireWork(store, retiring, self.moment_pages, self.work.num_evicted)

    def twin(self) -> "Case":
        """The same case on a copy of the cache and of what was observed."""
        other = object.__new__(Case)
        vars(other).update(vars(self))
        other.cache = CacheView.of_vllm_gpu(self.cache.kv.clone(), self.shape.layout)
        other.mass, other.output, other.lse = Observed(self.mass.data.clone()), self.output.clone(), self.lse.clone()
        return other
