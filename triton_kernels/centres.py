"""Centres of a quantised store's keys (momentkv_vllm/key_centres.py), [D] float32 each; zeros where keys have none."""

import triton
import triton.language as tl

from .common import float_at
from .store import TILE


@triton.jit
def _at(records, head, pages, which, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr):
    d = tl.arange(0, SIZES.block_d)
    index = STORE.centres_at // 4 + which * SIZES.head_dim + d
    return float_at(records, head, pages, index, d < SIZES.head_dim, RECORD)


@triton.jit
def load_centres(records, head, pages, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr):
    """(of the first tile's keys, of all others) as the record in `pages` has them; before there is one, they mean nothing."""
    first, others = tl.zeros((SIZES.block_d,), tl.float32), tl.zeros((SIZES.block_d,), tl.float32)
    if STORE.centres_at >= 0:
        real = tl.arange(0, SIZES.block_d) < SIZES.head_dim
        first = tl.load(_at(records, head, pages, 0, SIZES, STORE, RECORD), mask=real, other=0.0)
        others = tl.load(_at(records, head, pages, 1, SIZES, STORE, RECORD), mask=real, other=0.0)
    return first, others


@triton.jit
def write_centres(records, head, pages, first, others, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr):
    real = tl.arange(0, SIZES.block_d) < SIZES.head_dim
    tl.store(_at(records, head, pages, 0, SIZES, STORE, RECORD), first, mask=real)
    tl.store(_at(records, head, pages, 1, SIZES, STORE, RECORD), others, mask=real)


@triton.jit
def of_slots(first, others, slots):
    """[N, D]: the centre of every store slot [N]."""
    return tl.where((slots < TILE)[:, None], first[None, :], others[None, :])


@triton.jit
def products(q, first, others):
    """(q . first, q . others) [M] of queries [M, D]: what centres add to products with keys."""
    x = q.to(tl.float32)
    return tl.sum(x * first[None, :], 1), tl.sum(x * others[None, :], 1)


@triton.jit
def added(q_first, q_others, slots):
    """[M, N]: what the centre of every store slot [N] adds to `products`."""
    return tl.where((slots < TILE)[None, :], q_first[:, None], q_others[:, None])


@triton.jit
def finite(x):
    return tl.where(x - x == 0, x, 0.0)
