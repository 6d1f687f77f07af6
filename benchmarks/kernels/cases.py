"""Caches, work lists and callables for the kernel benchmark: our kernels and vLLM's own on the same pages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from momentkv_vllm.kernels import cpu, moments
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.policies import POLICIES

SINKS = 4


@dataclass(frozen=True)
class Shape:
    """One decode or chunk step of a layer: `rows` sequences that retain `slots` tokens each, `queries` new ones a row."""

    head_dim: int = 128
    kv_heads: int = 4
    groups: int = 4
    slots: int = 1024
    rows: int = 8
    queries: int = 1
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    first_order: bool = False

    @property
    def record(self) -> RecordLayout:
        return RecordLayout(self.head_dim, has_covariance=self.first_order)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that one call must read."""
        return self.rows * self.slots * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize

    @property
    def record_bytes(self) -> int:
        return self.rows * self.kv_heads * self.record.num_bytes

    @property
    def label(self) -> str:
        step = "decode" if self.queries == 1 else f"chunk of {self.queries}"
        order = ", first order" if self.first_order else ""
        return f"{step}, {self.rows} x {self.slots} tokens, d={self.head_dim}, {self.groups} queries a KV head{order}"


class Case:
    """Random tokens and records for a shape, the pages of every row scattered over the pool."""

    def __init__(self, shape: Shape) -> None:
        s = self.shape = shape
        generator = torch.Generator().manual_seed(0)
        record = s.record
        num_moments, num_pages = record.pages(s.page_size, s.dtype.itemsize), -(-s.slots // s.page_size)
        total = 1 + s.rows * (num_pages + num_moments)
        kv = torch.randn(total, s.kv_heads, s.page_size, 2 * s.head_dim, generator=generator).to(s.dtype)
        self.cache = CacheView.of_vllm_cpu(kv, record)
        owned = (torch.randperm(total - 1, generator=generator) + 1).view(s.rows, -1)
        self.pages, self.moment_pages = (x.contiguous() for x in owned.split([num_pages, num_moments], 1))
        gone = (torch.randn(s.rows, s.kv_heads, 64, s.head_dim, generator=generator) for _ in range(2))
        self.cache.write_moments(
            self.moment_pages, moments.of_tokens(*gone, torch.ones(s.rows, s.kv_heads, 64), s.first_order)
        )
        heads = s.kv_heads * s.groups
        self.query = torch.randn(s.rows * s.queries, heads, s.head_dim, generator=generator).to(s.dtype)
        self.output = torch.empty_like(self.query)
        self.lse = torch.full(self.query.shape[:2], 10.0)
        self.slot_mass = torch.rand(total, s.kv_heads, s.page_size, generator=generator)
        self.scale = s.head_dim**-0.5
        self.work = AttendWork(
            first_token=torch.arange(s.rows) * s.queries,
            queries=torch.full((s.rows,), s.queries),
            pages=self.pages,
            last=torch.full((s.rows,), s.slots - s.queries),
            moment_pages=self.moment_pages,
            count=torch.full((s.rows,), 10_000.0),
        )

    def attend(self, correct: bool, family=cpu) -> None:
        family.attend(self.cache, self.query, self.output, None, self.work, self.scale, correct)

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
        return RetireWork(store, retiring, self.moment_pages[one], self.work.count[one])

    def retire(self, work: RetireWork, family=cpu) -> None:
        family.consolidate(self.cache, self.slot_mass, work, POLICIES["momentkv"](), SINKS, self.scale)

    def observe_work(self, rows: int) -> AttendWork:
        """One query of each of the first rows, whose attention the policy wants."""
        part = {name: x[:rows] for name, x in vars(self.work).items() if isinstance(x, torch.Tensor)}
        every = torch.zeros(rows, dtype=torch.int64)
        return AttendWork(**part, observe_from=every, restart=every.bool())

    def observe(self, work: AttendWork, family=cpu) -> None:
        family.observe(self.cache, self.slot_mass, self.query, self.lse, work, self.scale)
