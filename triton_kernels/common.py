"""What the Triton kernels share: products, rounding, where a record's numbers lie, one tile of attention."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b):
    """a @ b in the type of b, summed in float32. The interpreter multiplies bfloat16 as if it were integers: float32 there."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def program_head():
    """This program's KV head, 64 bits wide: in vLLM's layout LHBNC a head is as far from the next as its part of the pool."""
    return tl.program_id(1).to(tl.int64)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 to TYPE, to nearest even; the interpreter would cut bfloat16 off."""
    if INTERPRET and tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def record_offset(pages, index, mask, PER_PAGE: tl.constexpr, page_stride):
    """Where number `index` of a record lies: a record runs through a head's slices of its moment pages [M].

    PER_PAGE: numbers (of the type of index) that a head owns of a page; page_stride counts them too.
    """
    page = tl.load(pages + index // PER_PAGE, mask=mask, other=0).to(tl.int64)
    return page * page_stride + index % PER_PAGE


@triton.jit
def attend_tile(
    q, acc, peak, total, slots, limit, end, keys, values, pages, scale_log2,
    k_page, k_slot, k_dim, v_page, v_slot, v_dim,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One online-softmax update by the slots `slots` [N]; query m sees those up to limit[m], none is read past `end`.

    q [M, D]; acc [M, D], peak, total [M] float32 in base 2; keys, values: pointers of one head.
    """
    d = tl.arange(0, BLOCK_D)
    real = slots <= end
    page = tl.load(pages + slots // PAGE, mask=real, other=0).to(tl.int64)
    slot = slots % PAGE
    # Beyond `end` a page is unwritten and may hold anything: 0 * NaN would be NaN.
    k = tl.load(
        keys + (page * k_page + slot * k_slot)[None, :] + (d * k_dim)[:, None],
        mask=real[None, :] & (d < HEAD_DIM)[:, None],
        other=0.0,
    )
    logits = tl.where(slots[None, :] <= limit[:, None], dot(q, k) * scale_log2, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    v = tl.load(
        values + (page * v_page + slot * v_slot)[:, None] + (d * v_dim)[None, :],
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    return acc * shrink[:, None] + dot(p, v), higher, total * shrink + tl.sum(p, 1)


@triton.jit
def record_partial(
    q, q_at, asks, count, floats, covariance, pages, float_page, covariance_page, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_COVARIANCE: tl.constexpr, HAS_SCALES: tl.constexpr, HEADER: tl.constexpr,
    FLOATS: tl.constexpr, COVARIANCES: tl.constexpr,
):  # fmt: skip
    """What attention over the evicted tokens would have returned (moments.partial): (out [M, D], log mass [M]).

    q [M, D], read again in parts from the pointers q_at [M, 1] where asks [M]; floats, covariance: pointers to a head's slice
    of page 0 as float32 and as the covariance's type; HEADER: numbers of that type before the covariance; FLOATS,
    COVARIANCES: numbers of either type a head owns of a page.
    The caller skips records with count 0: their bytes mean nothing.
    """
    BLOCK_R: tl.constexpr = BLOCK_D if BLOCK_D < 64 else 64
    d = tl.arange(0, BLOCK_D)
    real = d < HEAD_DIM
    x = q.to(tl.float32)
    mean_key = tl.load(floats + record_offset(pages, d, real, FLOATS, float_page), mask=real, other=0.0)
    mean_value = tl.load(floats + record_offset(pages, HEAD_DIM + d, real, FLOATS, float_page), mask=real, other=0.0)
    log_mass = tl.log(count) + scale * tl.sum(x * mean_key[None, :], 1)
    out = tl.zeros_like(x) + mean_value[None, :]
    if HAS_COVARIANCE:
        # C q is a product of the tile of query heads with C [key, value]; in parts, for all of C may not fit shared memory.
        step = tl.zeros_like(x)
        for first in range(0, HEAD_DIM, BLOCK_R):
            i = first + tl.arange(0, BLOCK_R)
            row = i < HEAD_DIM
            part = tl.load(q_at + i[None, :], mask=asks[:, None] & row[None, :], other=0.0)
            at = record_offset(pages, HEADER + i * HEAD_DIM, row, COVARIANCES, covariance_page)
            c = tl.load(covariance + at[:, None] + d[None, :], mask=row[:, None] & real[None, :], other=0)
            if HAS_SCALES:
                c = c.to(tl.float32).to(q.dtype)  # exact; the interpreter cannot cast int8 to bfloat16
                at = record_offset(pages, 2 * HEAD_DIM + 1 + i, row, FLOATS, float_page)
                step += dot(part.to(tl.float32) * tl.load(floats + at, mask=row, other=0.0)[None, :], c)
            else:
                step += dot(part, c)
        step *= scale
        spread = tl.load(floats + record_offset(pages, 2 * HEAD_DIM, True, FLOATS, float_page))
        limit = tl.sqrt(tl.maximum(spread, 0.0))
        length = tl.sqrt(tl.sum(step * step, 1))
        out += step * tl.where(length > limit, limit / tl.maximum(length, 1e-30), 1.0)[:, None]
    return out, log_mass
