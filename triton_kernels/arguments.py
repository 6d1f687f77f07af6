"""Kernel arguments that several launches take: a cache by its strides, a record by its layout."""

from typing import Any

import torch
import triton


def tokens_of(cache) -> tuple:
    """(keys, values, their strides by page, head, slot, dim)."""
    return cache.keys, cache.values, *cache.keys.stride(), *cache.values.stride()


def record_of(cache) -> tuple:
    """(record as float32, as the covariance's type, their strides by page and by head), from page 0, head 0."""
    record = cache.record_layout
    floats = cache.raw.view(torch.float32)
    covariance = cache.raw.view(getattr(torch, record.moment_dtype)) if record.has_covariance else floats
    return floats, covariance, *floats.stride()[:2], *covariance.stride()[:2]


def record_sizes(cache) -> dict[str, Any]:
    """The record's compile-time sizes, see common.record_partial."""
    record = cache.record_layout
    item = getattr(torch, record.moment_dtype).itemsize
    return {
        "HAS_COVARIANCE": record.has_covariance,
        "HAS_SCALES": record.has_scales,
        "HEADER": record.header_bytes // item,
        "FLOATS": cache.raw.shape[2] // 4,
        "COVARIANCES": cache.raw.shape[2] // item,
    }


def sizes(cache) -> dict[str, int]:
    """Head and page sizes; dimensions are padded to a power of two, and to what a matrix product needs."""
    head_dim = cache.keys.shape[3]
    return {"PAGE": cache.page_size, "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
