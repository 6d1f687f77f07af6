"""`make bench-store`: attention over a quantised store against 16-bit stores of as many bytes and of as many tokens.

Correctness first; then medians of interleaved repeats, caches flushed before every call. Ratios are what counts.
"""

from dataclasses import replace
from typing import Any

import report
import torch
from kernels.cases import CPU, Case, Shape
from kernels.run import interleaved

from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.packed_store import Packed, PackedLayout

BUDGET, WINDOW = 1024, 128
SHAPES = [
    *(Shape(rows=rows) for rows in (1, 8, 32)),
    *(Shape(head_dim=64, rows=rows) for rows in (1, 8, 32)),
    *(Shape(groups=groups) for groups in (1, 8)),
    Shape(rows=4, queries=16),
]


class StoreCase(Case):
    """A window of exact tokens behind a full store of `dtype`, in the bytes of BUDGET tokens."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        super().__init__(replace(shape, slots=BUDGET))
        s, layout = self.shape, PackedLayout(dtype, shape.head_dim)
        self.cache = CacheView.of_vllm_cpu(self.cache.kv, s.layout, layout)
        self.store_pages = (BUDGET - WINDOW) // s.page_size
        self.tokens = self.store_pages * self.cache.packed.page_tokens
        for row in range(s.rows):
            keys, values = torch.randn(2, 1, s.kv_heads, self.tokens, s.head_dim)
            self.cache.packed.write(self.pages[row : row + 1, : self.store_pages], Packed.of(keys, values, layout))
        self.work.stored = torch.full((s.rows,), self.tokens)
        self.work.store_pages = self.store_pages
        self.work.last_slot = torch.full((s.rows,), WINDOW - s.queries)


def check(case: StoreCase) -> None:
    """No figure without a right answer. Raises AssertionError."""
    case.attend(True)
    ours = case.output.clone()
    case.attend(True, select("reference"))
    torch.testing.assert_close(ours, case.output, rtol=2**-5, atol=2**-7)


def measure(shape: Shape, dtype: str) -> dict[str, Any]:
    store = StoreCase(shape, dtype)
    check(store)
    bytes_, tokens = Case(replace(shape, slots=BUDGET)), Case(replace(shape, slots=store.tokens + WINDOW))
    t = interleaved(
        {name: (lambda c=c: c.attend(True)) for name, c in (("store", store), ("b", bytes_), ("t", tokens))}
    )
    return {
        "shape": replace(shape, slots=BUDGET).label, "store_dtype": dtype, "tokens": store.tokens + WINDOW,
        "to_same_bytes": t["store"] / t["b"], "to_same_tokens": t["store"] / t["t"],
    }  # fmt: skip


def main() -> None:
    rows = [measure(shape, dtype) for dtype in ("int8", "int4") for shape in SHAPES]
    print(
        report.table([list(rows[0]), *([f"{x:.2f}" if isinstance(x, float) else x for x in r.values()] for r in rows)])
    )
    report.write("store", {"kernels": CPU.label(), "attend": rows})


if __name__ == "__main__":
    main()
