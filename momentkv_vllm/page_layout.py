"""Byte layout of a moment record inside a sequence's moment pages.

One record per KV head: the head's slices of the M moment pages, read one after the other as bytes, hold

    mean key     [head_dim] float32
    mean value   [head_dim] float32
    value spread [1]        float32   mean squared distance of the evicted values to their mean (trust region)
    scales       [head_dim] float32   one per covariance row (only for int8)
    padding                           up to a whole number of covariance rows, so that no row straddles two pages
    covariance   [head_dim, head_dim] moment_dtype, rows = key dims, columns = value dims (only for order "first");
                                      int8: a row's numbers times its scale, the largest being 127

The count n is not stored: the page schedule knows it. A record is meaningless, and never read, while n = 0, so a recycled
page needs no clearing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from momentkv_vllm.page_schedule import cdiv

_DTYPE_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


class RecordOffsets(NamedTuple):
    """Where the parts of a record begin, in bytes; a part that the record lacks has no bytes. Kernels get these numbers."""

    mean_key: int
    mean_value: int
    spread: int
    scales: int
    covariance: int


@dataclass(frozen=True)
class RecordLayout:
    """Sizes of one head's record. `has_covariance` False drops C; an empty layout (`has_means` False) has no bytes."""

    head_dim: int
    moment_dtype: str = "bfloat16"
    has_means: bool = True
    has_covariance: bool = True

    @cached_property
    def offsets(self) -> RecordOffsets:
        if not self.has_means:
            return RecordOffsets(0, 0, 0, 0, 0)
        means = 4 * self.head_dim
        scales_end = 2 * means + 4 + (means if self.has_scales else 0)
        covariance = cdiv(scales_end, self._row_bytes) * self._row_bytes
        return RecordOffsets(
            mean_key=0, mean_value=means, spread=2 * means, scales=2 * means + 4, covariance=covariance
        )

    @property
    def has_scales(self) -> bool:
        return self.has_covariance and self.moment_dtype == "int8"

    @property
    def num_bytes(self) -> int:
        return self.offsets.covariance + (self.head_dim * self._row_bytes if self.has_covariance else 0)

    @property
    def _row_bytes(self) -> int:
        return self.head_dim * _DTYPE_BYTES[self.moment_dtype]

    def pages(self, page_size: int, kv_dtype_bytes: int) -> int:
        """Moment pages M a sequence needs; a head owns page_size * 2 * head_dim numbers of a page."""
        return cdiv(self.num_bytes, page_size * 2 * self.head_dim * kv_dtype_bytes)
