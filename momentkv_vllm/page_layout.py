"""Byte layout of a moment record inside a sequence's moment pages.

One record per KV head: the head's slices of the M moment pages, read one after the other as bytes, hold

    first key    [head_dim] float32   centre of the first tile of a quantised store (key_centres.py)
    other keys   [head_dim] float32   centre of its other tiles
    mean key     [head_dim] float32
    mean value   [head_dim] float32
    value spread [1]        float32   mean squared distance of the evicted values to their mean (trust region)
    scales       [head_dim] float32   one per covariance row (only for int8)
    padding                           up to a whole number of covariance rows, so that no row straddles two pages
    covariance   [head_dim, head_dim] moment_dtype, rows = key dims, columns = value dims (only for order "first");
                                      int8: a row's numbers times its scale, the largest being 127

The count n is not stored: the page schedule knows it. Moments are meaningless, and never read, while n = 0, so a recycled
page needs no clearing; centres likewise until the store is quantised.
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
    """Sizes of one head's record. `has_covariance` False drops C, `has_means` False all moments.

    has_centres: those of a quantised store's keys come first.
    start: byte of its first page where it begins; more than 0 where it lies behind the tokens of a store page.
    """

    head_dim: int
    moment_dtype: str = "bfloat16"
    has_means: bool = True
    has_covariance: bool = True
    has_centres: bool = False
    start: int = 0

    @cached_property
    def offsets(self) -> RecordOffsets:
        first = 2 * 4 * self.head_dim if self.has_centres else 0
        if not self.has_means:
            return RecordOffsets(*[self.start + first] * 5)
        means = 4 * self.head_dim
        spread = first + 2 * means
        scales_end = spread + 4 + (means if self.has_scales else 0)
        covariance = cdiv(scales_end, self._row_bytes) * self._row_bytes
        return RecordOffsets(*(self.start + x for x in (first, first + means, spread, spread + 4, covariance)))

    @property
    def has_scales(self) -> bool:
        return self.has_covariance and self.moment_dtype == "int8"

    @property
    def num_bytes(self) -> int:
        covariance = self.head_dim * self._row_bytes if self.has_covariance else 0
        return self.offsets.covariance - self.start + covariance

    @property
    def _row_bytes(self) -> int:
        return self.head_dim * _DTYPE_BYTES[self.moment_dtype]

    def pages(self, page_size: int, kv_dtype_bytes: int) -> int:
        """Moment pages M a sequence needs; a head owns page_size * 2 * head_dim numbers of a page."""
        return cdiv(self.num_bytes, page_size * 2 * self.head_dim * kv_dtype_bytes)
