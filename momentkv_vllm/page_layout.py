"""Byte layout of a moment record inside a sequence's moment pages.

One record per KV head: the head's slices of the M moment pages, read one after the other as bytes, hold

    mean key     [head_dim] float32
    mean value   [head_dim] float32
    value spread [1]        float32   mean squared distance of the evicted values to their mean (trust region)
    padding      [3]        float32   keeps the covariance 16-byte aligned
    covariance   [head_dim, head_dim] moment_dtype, rows = value dims, columns = key dims (only for order "first")

The count n is not stored: the page schedule knows it. A record is meaningless, and never read, while n = 0, so a recycled
page needs no clearing.
"""

from dataclasses import dataclass

from momentkv_vllm.page_schedule import cdiv

_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
_SCALARS = 4


@dataclass(frozen=True)
class RecordLayout:
    """Sizes of one head's record. `has_covariance` False drops C; an empty layout (`has_means` False) has no bytes."""

    head_dim: int
    moment_dtype: str = "bfloat16"
    has_means: bool = True
    has_covariance: bool = True

    @property
    def header_floats(self) -> int:
        return 2 * self.head_dim + _SCALARS if self.has_means else 0

    @property
    def num_bytes(self) -> int:
        covariance = self.head_dim**2 * _DTYPE_BYTES[self.moment_dtype] if self.has_covariance else 0
        return self.header_floats * 4 + covariance

    def pages(self, page_size: int, kv_dtype_bytes: int) -> int:
        """Moment pages M a sequence needs; a head owns page_size * 2 * head_dim numbers of a page."""
        return cdiv(self.num_bytes, page_size * 2 * self.head_dim * kv_dtype_bytes)
