"""write: new keys and values into their slots; a page is zeroed when its first slot is written."""

import torch
import triton
import triton.language as tl

from .arguments import sizes, tokens_of
from .common import program_head

WARPS = 1
"""A program moves as many numbers as a head has; a warp does that, a page that it opens takes it longer."""


@triton.jit(do_not_specialize=["num_tokens"])
def _write(
    key, value, slots, mass, tokens, key_token, key_head, value_token, value_head, m_page, m_head, num_tokens,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Program (token, KV head): a token's key and value, and what else its page holds if it opens the page."""
    token, head = tl.program_id(0), program_head()
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    page, offset = slot // SIZES.page, slot % SIZES.page
    d = tl.arange(0, BLOCK_D)
    real = d < SIZES.head_dim
    keys = tokens.k + page * tokens.k_page + head * tokens.k_head
    values = tokens.v + page * tokens.v_page + head * tokens.v_head
    new_key = tl.load(key + token * key_token + head * key_head + d, mask=real)
    new_value = tl.load(value + token * value_token + head * value_head + d, mask=real)
    tl.store(keys + offset * tokens.k_slot + d * tokens.k_dim, new_key, mask=real)
    tl.store(values + offset * tokens.v_slot + d * tokens.v_dim, new_value, mask=real)
    if offset == 0:
        # The page's other tokens of this call follow in the list: their programs write their slots.
        s = tl.arange(0, BLOCK_S)
        mine = (s > 0) & (s < SIZES.page)
        theirs = tl.load(slots + token + s, mask=mine & (token + s < num_tokens), other=-1).to(tl.int64)
        empty = (mine & (theirs != slot + s))[:, None] & real[None, :]
        zero = tl.zeros((BLOCK_S, BLOCK_D), keys.dtype.element_ty)
        tl.store(keys + (s * tokens.k_slot)[:, None] + (d * tokens.k_dim)[None, :], zero, mask=empty)
        tl.store(values + (s * tokens.v_slot)[:, None] + (d * tokens.v_dim)[None, :], zero, mask=empty)
        if HAS_MASS:
            tl.store(mass + page * m_page + head * m_head + s, tl.zeros((BLOCK_S,), tl.float32), mask=s < SIZES.page)


def write(cache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, mass: torch.Tensor | None) -> None:
    """As kernels/base.py. Tokens of one page follow one another in `slots`, as vLLM lays them out."""
    heads, head_dim = key.shape[1:]
    mass_strides = mass.stride()[:2] if mass is not None else (0, 0)
    _write[(len(slots), heads)](
        key, value, slots, mass if mass is not None else slots, tokens_of(cache), *key.stride()[:2], *value.stride()[:2],
        *mass_strides, len(slots), BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_S=triton.next_power_of_2(cache.page_size),
        HAS_MASS=mass is not None, SIZES=sizes(cache), num_warps=WARPS,
    )  # fmt: skip
