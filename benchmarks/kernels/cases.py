"""Caches, work lists and callables for the kernel benchmark: our kernels and vLLM's own on the same pages."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import shape
import torch
from shape import SINKS
from vllm import _custom_ops as ops

from momentkv_vllm import moments
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies import find

CPU = select("cpu")


@dataclass(frozen=True)
class Shape(shape.Shape):
    """One step of a layer in vLLM's CPU cache."""

    @property
    def label(self) -> str:
        order = "" if self.record == "zeroth" else ", first order"
        return (
            f"{self.step}, {self.rows} x {self.slots} tokens, d={self.head_dim}, {self.groups} queries a KV head{order}"
        )


class Case:
    """Random tokens and records for a shape, the pages of every row scattered over the pool."""

    def __init__(self, s: Shape) -> None:
        self.shape = s
        generator = torch.Generator().manual_seed(0)
        total, self.pages, self.moment_pages = s.deal_pages(generator)
        kv = torch.randn(total, s.kv_heads, s.page_size, 2 * s.head_dim, generator=generator).to(s.dtype)
        self.cache = CacheView.of_vllm_cpu(kv, s.layout)
        gone = (torch.randn(s.rows, s.kv_heads, 64, s.head_dim, generator=generator) for _ in range(2))
        self.cache.write_moments(
            self.moment_pages, moments.of_tokens(*gone, torch.ones(s.rows, s.kv_heads, 64), s.layout.has_covariance)
        )
        heads = s.kv_heads * s.groups
        self.query = torch.randn(s.rows * s.queries, heads, s.head_dim, generator=generator).to(s.dtype)
        self.output = torch.empty_like(self.query)
        self.observed = Observed(torch.rand(total, s.kv_heads, s.page_size, generator=generator))
        self.scale = s.head_dim**-0.5
        self.work = AttendWork(
            first_token=torch.arange(s.rows) * s.queries,
            num_queries=torch.full((s.rows,), s.queries),
            pages=self.pages,
            last_slot=torch.full((s.rows,), s.slots - s.queries),
            moment_pages=self.moment_pages,
            num_evicted=torch.full((s.rows,), 10_000.0),
        )

    def attend(self, corrected: bool, family=CPU) -> None:
        family.attend(self.cache, self.query, self.output, None, self.work, self.scale, corrected)

    def vllm_attend(self) -> Callable[[], None]:
        """vLLM's own kernel over the same pages; its scheduling is prepared outside the timed call, as in the engine."""
        s, kv = self.shape, self.cache.kv
        seq_lens = torch.full((s.rows,), s.slots, dtype=torch.int32)
        query_start = (torch.arange(s.rows + 1) * s.queries).to(torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=s.rows,
            num_heads=s.kv_heads * s.groups,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            seq_lens=seq_lens,
            dtype=s.dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=-1,
            isa="vec" if s.page_size % 32 == 0 else "vec16",
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
        keys, values = kv.view(len(kv), s.kv_heads, 2 * s.page_size, s.head_dim).chunk(2, dim=2)
        table = self.pages.to(torch.int32)
        return lambda: ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=keys,
            value_cache=values,
            output=self.output,
            query_start_loc=query_start,
            seq_lens=seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    def retire_work(self, row: int, retire_pages: int) -> RetireWork:
        """One event of one row by the default's layout: half of its pages are the store, then come those that retire."""
        one, store_pages = slice(row, row + 1), self.pages.shape[1] // 2
        store, retiring, _ = (
            x.contiguous() for x in self.pages[one].tensor_split([store_pages, store_pages + retire_pages], 1)
        )
        return RetireWork(store, retiring, self.moment_pages[one], self.work.num_evicted[one])

    def retire(self, work: RetireWork, family=CPU) -> None:
        family.consolidate(self.cache, self.observed, work, find("momentkv")(), SINKS, self.scale)

    def observe_work(self) -> AttendWork:
        """A step of which the policy wants to know the attention of every row."""
        every = torch.zeros_like(self.work.last_slot)
        return replace(self.work, observe_from=every, restart=every.bool())

    def attend_and_observe(self, work: AttendWork, family=CPU) -> None:
        family.attend_and_observe(self.cache, self.observed, self.query, self.output, work, self.scale, True)
