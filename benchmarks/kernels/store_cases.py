"""A quantised store behind a window, for the kernel benchmark."""

from dataclasses import replace

import torch
from kernels.cases import Case, Shape

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import RetireWork
from momentkv_vllm.packed_store import Packed, PackedLayout

BUDGET, WINDOW, RUN = 1024, 128, 8


class StoreCase(Case):
    """A window of exact tokens behind a full store of `dtype`, in the bytes of BUDGET tokens."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        super().__init__(replace(shape, slots=BUDGET, centred=True))
        s, layout = self.shape, PackedLayout(dtype, shape.head_dim)
        self.cache = CacheView.of_vllm_cpu(self.cache.kv, s.layout, layout)
        self.cache.write_centres(self.moment_pages, torch.randn(s.rows, s.kv_heads, 2, s.head_dim))
        self.store_pages = (BUDGET - WINDOW) // s.page_size
        self.tokens = self.store_pages * self.cache.packed.page_tokens
        for row in range(s.rows):
            keys, values = torch.randn(2, 1, s.kv_heads, self.tokens, s.head_dim)
            self.cache.packed.write(self.pages[row : row + 1, : self.store_pages], Packed.of(keys, values, layout))
        self.work.stored = torch.full((s.rows,), self.tokens)
        self.work.store_pages = self.store_pages
        self.work.last_slot = torch.full((s.rows,), WINDOW - s.queries)
        self.observed = Observed.of(self.cache, "mass")
        self.observed.data.uniform_()

    def retire_work(self, row: int, retire_pages: int) -> RetireWork:
        """One event of one row: the oldest pages of the window compete in runs with a full store."""
        one = slice(row, row + 1)
        store, retiring, _ = self.pages[one].tensor_split([self.store_pages, self.store_pages + retire_pages], 1)
        return RetireWork(
            store.contiguous(), retiring.contiguous(), self.moment_pages[one], self.work.num_evicted[one], RUN,
            self.work.stored[one], self.tokens,
        )  # fmt: skip
