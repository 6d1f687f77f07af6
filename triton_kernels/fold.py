"""consolidate, second part: the moments of those who go, merged into the record."""

import triton
import triton.language as tl

from .common import covariance_rows, dot, float_at, narrow
from .event import load_keys, load_values


@triton.jit
def fold(
    tokens, tiles, head, event, loser_list,
    BLOCK_L: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, HAS_COVARIANCE: tl.constexpr,
):  # fmt: skip
    """Mean key and value [D], value spread and covariance [D, D] of the losers: means, then what is centred (two passes: no
    cancellation)."""
    D: tl.constexpr = SIZES.block_d
    losers = event.losers
    mean_key = tl.zeros((D,), tl.float32)
    mean_value = tl.zeros((D,), tl.float32)
    for first in range(0, losers, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        i = tl.load(loser_list + j, mask=j < losers, other=0)
        mean_key += tl.sum(load_keys(tokens, tiles, head, event, i, j < losers, SIZES, STORE), 0)
        mean_value += tl.sum(load_values(tokens, tiles, head, event, i, j < losers, SIZES, STORE), 0)
    mean_key /= losers
    mean_value /= losers
    squares = tl.zeros((D,), tl.float32)
    product = tl.zeros((D, D) if HAS_COVARIANCE else (1, 1), tl.float32)
    for first in range(0, losers, BLOCK_L):
        j = first + tl.arange(0, BLOCK_L)
        i = tl.load(loser_list + j, mask=j < losers, other=0)
        dv = load_values(tokens, tiles, head, event, i, j < losers, SIZES, STORE)
        dv = tl.where((j < losers)[:, None], dv - mean_value[None, :], 0.0)
        squares += tl.sum(dv * dv, 0)
        if HAS_COVARIANCE:
            dk = load_keys(tokens, tiles, head, event, i, j < losers, SIZES, STORE)
            dk = tl.where((j < losers)[:, None], dk - mean_key[None, :], 0.0)
            product += dot(tl.trans(dk), dv)
    return mean_key, mean_value, tl.sum(squares, 0) / losers, product / losers


@triton.jit
def merged(
    records, head, pages, before, losers, mean_key, mean_value, spread, covariance,
    SIZES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """The moments of record and losers together (Chan et al. 1979). Nothing of an empty record counts: its pages hold tokens."""
    d = tl.arange(0, SIZES.block_d)
    real = d < SIZES.head_dim
    old = d < tl.where(before > 0, SIZES.head_dim, 0)
    share = losers / (before + losers)
    between = share * (1 - share)
    old_key = tl.load(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mask=old, other=0.0)
    old_value = tl.load(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mask=old, other=0.0)
    delta_key = tl.where(old, mean_key - old_key, 0.0)
    delta_value = tl.where(old, mean_value - old_value, 0.0)
    old_spread = tl.load(float_at(records, head, pages, RECORD.spread, True, RECORD))
    mixed = old_spread + share * (spread - old_spread) + between * tl.sum(delta_value * delta_value, 0)
    spread = tl.where(before > 0, mixed, spread)
    mean_key -= (1 - share) * delta_key
    mean_value -= (1 - share) * delta_value
    if RECORD.has_covariance:
        at = covariance_rows(records, head, pages, d, real, SIZES, RECORD) + d[None, :]
        c_old = tl.load(at, mask=old[:, None] & real[None, :], other=0).to(tl.float32)
        if RECORD.has_scales:
            scales = tl.load(float_at(records, head, pages, RECORD.scales + d, real, RECORD), mask=old, other=0.0)
            c_old *= scales[:, None]
        mixed_c = c_old + share * (covariance - c_old) + between * delta_key[:, None] * delta_value[None, :]
        covariance = tl.where(before > 0, mixed_c, covariance)
    return mean_key, mean_value, spread, covariance


@triton.jit
def write_record(
    records, head, pages, mean_key, mean_value, spread, covariance, SIZES: tl.constexpr, RECORD: tl.constexpr
):
    """covariance [D (key), D (value)] is rounded to the record's type; int8: a row's largest number becomes 127."""
    d = tl.arange(0, SIZES.block_d)
    real = d < SIZES.head_dim
    tl.store(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mean_key, mask=real)
    tl.store(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mean_value, mask=real)
    tl.store(float_at(records, head, pages, RECORD.spread, True, RECORD), spread)
    if RECORD.has_covariance:
        if RECORD.has_scales:
            scale = tl.max(tl.abs(covariance), 1) / 127
            tl.store(float_at(records, head, pages, RECORD.scales + d, real, RECORD), scale, mask=real)
            covariance = tl.floor(covariance / tl.maximum(scale, 1.2e-38)[:, None] + 0.5)
        at = covariance_rows(records, head, pages, d, real, SIZES, RECORD) + d[None, :]
        tl.store(at, narrow(covariance, records.covariance.dtype.element_ty), mask=real[:, None] & real[None, :])
