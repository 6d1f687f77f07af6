"""What the Triton kernels share: products, rounding, where a record's numbers lie, what attention reads in a record."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LAYER_NUMBERS = tl.constexpr(5)
"""Of a layer in LayersOf.offsets (momentkv_vllm/kernels/worklists.py)."""


@triton.jit
def dot(a, b):
    """a @ b in the type of b, summed in float32. The interpreter multiplies bfloat16 as if it were integers: float32 there."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def dot_rotated(x, b):
    """x @ b for x float32 of more bits than b's type holds, as the sum of two numbers of it: what a rotated query would lose to
    rounding shifts the logits of a whole store."""
    if b.dtype == tl.float32:
        return dot(x, b)
    else:
        high = narrow(x, b.dtype)
        return dot(high, b) + dot(x - high.to(tl.float32), b)


@triton.jit
def tanh(x):
    """In what the interpreter knows too; no exponential overflows."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -far, far)


@triton.jit
def capped(logits, SIZES: tl.constexpr):
    """Scaled logits as the softmax sees them."""
    if SIZES.softcap != 0:
        return tanh(logits / SIZES.softcap) * SIZES.softcap
    else:
        return logits


@triton.jit
def program_head():
    """This program's KV head, 64 bits wide: in vLLM's layout LHBNC a head is as far from the next as its part of the pool."""
    return tl.program_id(1).to(tl.int64)


@triton.jit
def moved(pointer, by):
    """A pointer moved by bytes, a multiple of 16."""
    ITEM: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return pointer + tl.multiple_of(by // ITEM, 16 // ITEM)


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
def float_at(records, head, pages, index, mask, RECORD: tl.constexpr):
    """Pointers to a record's float32 numbers `index`."""
    return records.floats + head * records.f_head + record_offset(pages, index, mask, RECORD.floats, records.f_page)


@triton.jit
def covariance_rows(records, head, pages, row, mask, SIZES: tl.constexpr, RECORD: tl.constexpr):
    """Pointers [rows, 1] to where rows of a record's covariance begin."""
    at = RECORD.covariance + row * SIZES.head_dim
    base = records.covariance + head * records.c_head
    return base + record_offset(pages, at, mask, RECORD.covariances, records.c_page)[:, None]


@triton.jit
def record_partial(q, q_at, asks, num_evicted, records, head, pages, scale, SIZES: tl.constexpr, RECORD: tl.constexpr):
    """What attention over the evicted tokens would have returned, (out [M, D], log mass [M]): `partial` of moments.py.

    q [M, D], read again in parts from the pointers q_at [M, 1] where asks [M]; pages: the row's moment pages.
    The caller skips records that hold no token: their bytes mean nothing.
    """
    d = tl.arange(0, SIZES.block_d)
    real = d < SIZES.head_dim
    x = q.to(tl.float32)
    mean_key = tl.load(float_at(records, head, pages, RECORD.mean_key + d, real, RECORD), mask=real, other=0.0)
    mean_value = tl.load(float_at(records, head, pages, RECORD.mean_value + d, real, RECORD), mask=real, other=0.0)
    logits = scale * tl.sum(x * mean_key[None, :], 1)
    log_mass = tl.log(num_evicted) + capped(logits, SIZES)
    out = tl.zeros_like(x) + mean_value[None, :]
    if RECORD.has_covariance:
        step = _times_covariance(q, q_at, asks, records, head, pages, SIZES, RECORD) * scale
        if SIZES.softcap != 0:
            bent = tanh(logits / SIZES.softcap)
            step *= (1.0 - bent * bent)[:, None]
        spread = tl.load(float_at(records, head, pages, RECORD.spread, True, RECORD))
        limit = tl.sqrt(tl.maximum(spread, 0.0))
        length = tl.sqrt(tl.sum(step * step, 1))
        out += step * tl.where(length > limit, limit / tl.maximum(length, 1e-30), 1.0)[:, None]
    return out, log_mass


@triton.jit
def _times_covariance(q, q_at, asks, records, head, pages, SIZES: tl.constexpr, RECORD: tl.constexpr):
    """C q [M, D], a product of the tile of query heads with C [key, value]; in parts, for all of C may not fit shared memory."""
    PART: tl.constexpr = SIZES.block_d if SIZES.block_d < 64 else 64
    d = tl.arange(0, SIZES.block_d)
    step = tl.zeros_like(q.to(tl.float32))
    for first in range(0, SIZES.head_dim, PART):
        i = first + tl.arange(0, PART)
        row = i < SIZES.head_dim
        part = tl.load(q_at + i[None, :], mask=asks[:, None] & row[None, :], other=0.0)
        at = covariance_rows(records, head, pages, i, row, SIZES, RECORD)
        c = tl.load(at + d[None, :], mask=row[:, None] & (d < SIZES.head_dim)[None, :], other=0)
        if RECORD.has_scales:
            c = c.to(tl.float32).to(q.dtype)  # exact; the interpreter cannot cast int8 to bfloat16
            scales = tl.load(float_at(records, head, pages, RECORD.scales + i, row, RECORD), mask=row, other=0.0)
            step += dot(part.to(tl.float32) * scales[None, :], c)
        else:
            step += dot(part, c)
    return step
