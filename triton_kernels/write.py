"""write: new keys and values into their slots; a page is zeroed when its first slot is written."""

import torch
import triton
import triton.language as tl

from .common import program_head


@triton.jit
def _write(
    key, value, slots, keys, values, mass,
    key_token, key_head, value_token, value_head,
    k_page, k_head, k_slot, k_dim, v_page, v_head, v_slot, v_dim, m_page, m_head, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), program_head()
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    page, offset = slot // PAGE, slot % PAGE
    d = tl.arange(0, BLOCK_D)
    real = d < HEAD_DIM
    keys += page * k_page + head * k_head
    values += page * v_page + head * v_head
    new_key = tl.load(key + token * key_token + head * key_head + d, mask=real)
    new_value = tl.load(value + token * value_token + head * value_head + d, mask=real)
    tl.store(keys + offset * k_slot + d * k_dim, new_key, mask=real)
    tl.store(values + offset * v_slot + d * v_dim, new_value, mask=real)
    if offset == 0:
        # The page's other tokens of this call follow in the list: their programs write their slots.
        s = tl.arange(0, BLOCK_S)
        mine = (s > 0) & (s < PAGE)
        theirs = tl.load(slots + token + s, mask=mine & (token + s < num_tokens), other=-1).to(tl.int64)
        empty = (mine & (theirs != slot + s))[:, None] & real[None, :]
        zero = tl.zeros((BLOCK_S, BLOCK_D), keys.dtype.element_ty)
        tl.store(keys + (s * k_slot)[:, None] + (d * k_dim)[None, :], zero, mask=empty)
        tl.store(values + (s * v_slot)[:, None] + (d * v_dim)[None, :], zero, mask=empty)
        if HAS_MASS:
            tl.store(mass + page * m_page + head * m_head + s, tl.zeros((BLOCK_S,), tl.float32), mask=s < PAGE)


def write(cache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, observed: torch.Tensor | None) -> None:
    """As kernels/reference.py. Tokens of one page follow one another in `slots`, as vLLM lays them out."""
    heads, head_dim = key.shape[1:]
    page_size = cache.page_size
    mass_strides = observed.stride()[:2] if observed is not None else (0, 0)
    _write[(len(slots), heads)](
        key, value, slots, cache.keys, cache.values, observed if observed is not None else slots,
        *key.stride()[:2], *value.stride()[:2], *cache.keys.stride(), *cache.values.stride(), *mass_strides, len(slots),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PAGE=page_size,
        BLOCK_S=triton.next_power_of_2(page_size), HAS_MASS=observed is not None, num_warps=4,
    )  # fmt: skip
