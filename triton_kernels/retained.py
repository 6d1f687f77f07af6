"""Attention over what a row retains: the tokens of its quantised store, if it has one, and its exact pages."""

import triton
import triton.language as tl

from .centres import added, load_centres, products
from .common import LOG2E, capped, dot, dot_rotated, narrow
from .store import rotated, stored_keys, stored_values, tiles_at


@triton.jit
def exact_keys(tokens, head, page, slot, real, SIZES: tl.constexpr):
    """[D, N] of slots [N]. Beyond what is `real` a page is unwritten and may hold anything: 0 * NaN would be NaN."""
    d = tl.arange(0, SIZES.block_d)
    at = tokens.k + head * tokens.k_head + (page * tokens.k_page + slot * tokens.k_slot)[None, :]
    return tl.load(at + (d * tokens.k_dim)[:, None], mask=real[None, :] & (d < SIZES.head_dim)[:, None], other=0.0)


@triton.jit
def exact_values(tokens, head, page, slot, real, SIZES: tl.constexpr):
    """[N, D], likewise."""
    d = tl.arange(0, SIZES.block_d)
    at = tokens.v + head * tokens.v_head + (page * tokens.v_page + slot * tokens.v_slot)[:, None]
    return tl.load(at + (d * tokens.v_dim)[None, :], mask=real[:, None] & (d < SIZES.head_dim)[None, :], other=0.0)


@triton.jit
def _weights(logits, peak):
    """(weights like logits [M, N], by what older sums shrink, new peak [M]) of a running softmax in base 2."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(logits - base[:, None]), tl.exp2(peak - base), higher


@triton.jit
def _in_base_2(products, scale, SIZES: tl.constexpr):
    """Logits of products q.k: where no cap asks for them in base e, one multiplication."""
    if SIZES.softcap != 0:
        return capped(products * scale, SIZES) * LOG2E
    else:
        return products * (scale * LOG2E)


@triton.jit
def _attend_exact(
    q, acc, peak, total, slots, limit, end, tokens, head, pages, scale, left, leaves,
    SIZES: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """One softmax update by the slots `slots` [N] of exact pages; query m sees those up to limit[m], none is read past `end`."""
    real = slots <= end
    page = tl.load(pages + slots // SIZES.page, mask=real, other=0).to(tl.int64)
    slot = slots % SIZES.page
    k = exact_keys(tokens, head, page, slot, real, SIZES)
    logits = _in_base_2(dot(q, k), scale, SIZES)
    logits = tl.where(slots[None, :] <= limit[:, None], logits, float("-inf"))
    if LEAVE:
        tl.store(left[:, None] + slots[None, :], logits, mask=leaves[:, None] & real[None, :])
    p, shrink, peak = _weights(logits, peak)
    v = exact_values(tokens, head, page, slot, real, SIZES)
    return acc * shrink[:, None] + dot(p, v), peak, total * shrink + tl.sum(p, 1)


@triton.jit
def _attend_stored(
    q, q_first, q_others, acc, peak, total, slots, asks, stored, tiles, head, pages, scale, left, leaves,
    TYPE: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """Likewise by slots of a quantised store, of which all queries that ask [M] see the first `stored`; q [M, D] float32 and acc
    are rotated. q_first, q_others [M]: what the keys' centres add."""
    real = slots < stored
    at = tiles_at(tiles, head, pages, slots, real, STORE)
    k = narrow(stored_keys(tiles, at, slots, real, SIZES.block_d, STORE), TYPE)
    logits = _in_base_2(dot_rotated(q, k) + added(q_first, q_others, slots), scale, SIZES)
    logits = tl.where(asks[:, None] & real[None, :], logits, float("-inf"))
    if LEAVE:
        tl.store(left[:, None] + slots[None, :], logits, mask=leaves[:, None] & real[None, :])
    p, shrink, peak = _weights(logits, peak)
    v = narrow(stored_values(tiles, at, slots, real, SIZES.block_d, STORE), TYPE)
    return acc * shrink[:, None] + dot(p, v), peak, total * shrink + tl.sum(p, 1)


@triton.jit
def attend_retained(
    q, limit, store_from, store_to, exact_from, exact_to, tokens, tiles, head, pages, exact_pages, scale, left, left_exact,
    leaves, records, record_pages,
    BLOCK_N: tl.constexpr, SIZES: tl.constexpr, STORE: tl.constexpr, RECORD: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """(weighted sum of values [M, D], peak, sum of weights [M]) in base 2 of queries q [M, D] over slots [store_from, store_to)
    of the store in `pages`, whose keys' centres the record in `record_pages` has, and [exact_from, exact_to) of `exact_pages`.

    Query m sees exact slots up to limit[m]; -1: it is none. LEAVE: where leaves[m], its logits in base 2 are left behind
    left[m] by slot of the store and behind left_exact[m] by slot of exact pages.
    """
    acc = tl.zeros((q.shape[0], SIZES.block_d), tl.float32)
    peak = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    if STORE.bits and store_from < store_to:
        turned = rotated(q.to(tl.float32), STORE.block)
        first_key, others = load_centres(records, head, record_pages, SIZES, STORE, RECORD)
        q_first, q_others = products(q, first_key, others)
        for first in range(store_from, store_to, BLOCK_N):
            acc, peak, total = _attend_stored(
                turned, q_first, q_others, acc, peak, total, first + tl.arange(0, BLOCK_N), limit >= 0, store_to, tiles, head,
                pages, scale, left, leaves, q.dtype, SIZES, STORE, LEAVE,
            )  # fmt: skip
        acc = rotated(acc, STORE.block)
    for first in range(exact_from, exact_to, BLOCK_N):
        acc, peak, total = _attend_exact(
            q, acc, peak, total, first + tl.arange(0, BLOCK_N), limit, exact_to - 1, tokens, head, exact_pages, scale,
            left_exact, leaves, SIZES, LEAVE,
        )  # fmt: skip
    return acc, peak, total
