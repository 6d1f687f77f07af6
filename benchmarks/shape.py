"""A step of a layer as the kernel benchmarks of CPU and GPU describe it. Needs torch and this package only."""

from dataclasses import dataclass

import torch

from momentkv_vllm.page_layout import RecordLayout

SINKS = 4


@dataclass(frozen=True)
class Shape:
    """`rows` sequences that retain `slots` tokens each, `queries` new ones a row; record: covariance type, "zeroth" for none;
    centred: it has the centres of a quantised store's keys."""

    head_dim: int = 128
    kv_heads: int = 4
    groups: int = 4
    slots: int = 1024
    rows: int = 8
    queries: int = 1
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    record: str = "zeroth"
    centred: bool = False

    @property
    def layout(self) -> RecordLayout:
        first = self.record != "zeroth"
        dtype = self.record if first else "bfloat16"
        return RecordLayout(self.head_dim, dtype, has_covariance=first, has_centres=self.centred)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that one call must read."""
        return self.rows * self.slots * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize

    @property
    def record_bytes(self) -> int:
        return self.rows * self.kv_heads * self.layout.num_bytes

    @property
    def step(self) -> str:
        return "decode" if self.queries == 1 else f"chunk of {self.queries}"

    def deal_pages(self, generator: torch.Generator) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(pages of the pool, pages [rows, n] of each row, its moment pages [rows, M]), scattered; page 0 is nobody's."""
        num_moments, num_pages = (
            self.layout.pages(self.page_size, self.dtype.itemsize),
            -(-self.slots // self.page_size),
        )
        total = 1 + self.rows * (num_pages + num_moments)
        owned = torch.randperm(total - 1, generator=generator, device=generator.device) + 1
        pages, moments = (x.contiguous() for x in owned.view(self.rows, -1).split([num_pages, num_moments], 1))
        return total, pages, moments
