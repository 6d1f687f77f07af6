"""Quantised store pages: momentkv_vllm/packed_store.py says how a tile looks and what its codes mean.

Numbers come out of a store rotated. Attention rotates its queries instead and turns back what it sums; codes become numbers
in registers.
"""

import triton
import triton.language as tl

from .arguments import Tiles
from .common import moved

TILE = tl.constexpr(8)
"""Tokens of a tile."""
GROUP = tl.constexpr(32)
"""Numbers of a key that share a scale."""


@triton.jit
def rotated(x, BLOCK: tl.constexpr):
    """The Walsh-Hadamard transform of x [M, D] float32 in blocks of BLOCK numbers: bit for bit that of packed_store.py."""
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    for stage in tl.static_range(BLOCK.bit_length() - 1):
        pairs = tl.reshape(x, (M, D // (2 << stage), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (M, D))
    return x * BLOCK**-0.5


@triton.jit
def kept_tokens(stored, num_evicted, row, tiles, head, STORE: tl.constexpr):
    """(tokens of a head in a row's quantised store, 0: all its pages are exact; float32 number of those that it has evicted):
    `held` of csrc/common/params.h."""
    evicted = tl.load(num_evicted + row)
    if STORE.bits:
        held = tl.load(stored + row).to(tl.int32)
        if STORE.own_budgets:
            gone = held + evicted.to(tl.int32)
            own = tl.minimum(gone, tl.load(tiles.capacity + head).to(tl.int32))
            held = tl.where(gone > tiles.equal_tokens, own, held)
            evicted = (gone - held).to(tl.float32)
        return held, evicted
    else:
        return tl.full((), 0, tl.int32), evicted


@triton.jit
def tiles_of_layer(tiles, layers, STORE: tl.constexpr):
    """Of the layer whose offsets (LayersOf.offsets of kernels/worklists.py) begin at `layers`; `tiles`: of the first layer."""
    by, places, capacity = tl.load(layers), tiles.places, tiles.capacity
    if STORE.own_budgets:
        places, capacity = moved(places, tl.load(layers + 2)), moved(capacity, tl.load(layers + 3))
    return Tiles(
        moved(tiles.codes, by), moved(tiles.scales, by), tiles.page, tiles.head, places, capacity, tiles.most_tiles,
        tiles.equal_tokens,
    )  # fmt: skip


@triton.jit
def _place(tiles, head, slots):
    """Pointers [N] to where the tiles of a head's store slots lie: column of the page, bytes, numbers of what is observed."""
    return tiles.places + (head * tiles.most_tiles + slots // TILE) * 3


@triton.jit
def tiles_at(tiles, head, pages, slots, real, STORE: tl.constexpr):
    """Byte at which the tile of every store slot [N] begins. pages: those of the row's store."""
    if STORE.own_budgets:
        place = _place(tiles, head, slots)
        page = tl.load(pages + tl.load(place, mask=real, other=0), mask=real, other=0).to(tl.int64)
        return page * tiles.page + tl.multiple_of(tl.load(place + 1, mask=real, other=0), 16)
    else:
        tile = slots // TILE
        page = tl.load(pages + tile // STORE.page_tiles, mask=real, other=0).to(tl.int64)
        return page * tiles.page + head * tiles.head + tile % STORE.page_tiles * STORE.tile_bytes


@triton.jit
def observed_at(tiles, head, m_head, slots, real, STORE: tl.constexpr):
    """(columns of pages, numbers from the head's part of such a page) [N] where that lies which was observed of store slots."""
    if STORE.own_budgets:
        place = _place(tiles, head, slots)
        within = tl.load(place + 2, mask=real, other=0) - head * m_head + slots % TILE
        return tl.load(place, mask=real, other=0), within
    else:
        PAGE: tl.constexpr = STORE.page_tiles * TILE
        return slots // PAGE, slots % PAGE


@triton.jit
def _code_byte(d, STORE: tl.constexpr):
    """Which byte of a token's codes holds number d."""
    return d // GROUP * 16 + d % 16 if STORE.bits == 4 else d


@triton.jit
def _number(byte, d, STORE: tl.constexpr):
    """Code d less its middle, float32."""
    code = byte.to(tl.int32)
    if STORE.bits == 4:
        code = (code >> (d % GROUP // 16 * 4)) & 15
    return code.to(tl.float32) - ((1 << STORE.bits) - 1) / 2


@triton.jit
def _key_byte(byte, token):
    return byte // 4 * (4 * TILE) + token * 4 + byte % 4


@triton.jit
def _value_byte(byte, token, STORE: tl.constexpr):
    return STORE.values_at + token // 2 * (2 * STORE.code_bytes) + byte * 2 + token % 2


@triton.jit
def _scale_at(at, group, token, STORE: tl.constexpr):
    """Which scale of the memory is that of a key's group; the value's stands behind those of all groups."""
    return (at + STORE.scales_at) // 2 + group * TILE + token


@triton.jit
def _scale(tiles, at, mask):
    return (tl.load(tiles.scales + at, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def stored_keys(tiles, at, slots, real, D: tl.constexpr, STORE: tl.constexpr):
    """Rotated keys [D, N] float32 of store slots [N] whose tiles begin at `at`; zero where not `real`."""
    group = tl.arange(0, D // GROUP)[:, None, None]
    d = group * GROUP + tl.arange(0, GROUP)[None, :, None]
    at, token = at[None, None, :], (slots % TILE)[None, None, :]
    mask = (group < STORE.width // GROUP) & real[None, None, :]
    scale = _scale(tiles, _scale_at(at, group, token, STORE), mask)
    byte = tl.load(tiles.codes + at + _key_byte(_code_byte(d, STORE), token), mask=mask, other=0)
    return tl.reshape(_number(byte, d, STORE) * scale, (D, slots.shape[0]))


@triton.jit
def stored_values(tiles, at, slots, real, D: tl.constexpr, STORE: tl.constexpr):
    """Rotated values [N, D] float32, likewise."""
    d, token = tl.arange(0, D)[None, :], slots % TILE
    scale = _scale(tiles, _scale_at(at, STORE.width // GROUP, token, STORE), real)
    mask = real[:, None] & (d < STORE.width)
    byte = tl.load(
        tiles.codes + at[:, None] + _value_byte(_code_byte(d, STORE), token[:, None], STORE), mask=mask, other=0
    )
    return tl.where(mask, _number(byte, d, STORE) * scale[:, None], 0.0)


@triton.jit
def _levels(STORE: tl.constexpr):
    return 16 if STORE.bits == 4 else 254


@triton.jit
def _scales(x, STORE: tl.constexpr):
    """Of vectors x [N, vectors, numbers] as `quantised` of packed_store.py finds them: (scales, what numbers are multiplied by)
    [N, vectors] float32. NaN where a number is one."""
    LEVELS: tl.constexpr = _levels(STORE)
    is_nan = tl.max((x != x).to(tl.int32), 2) > 0
    wanted = tl.max(tl.abs(x), 2) * (2 / (LEVELS - 1))
    bits = (wanted.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    scale = tl.where(is_nan, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    return scale, tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)


@triton.jit
def _rounded(x, inverse, STORE: tl.constexpr):
    """Codes less half of the levels, float32, of numbers x."""
    LEVELS: tl.constexpr = _levels(STORE)
    code = tl.floor(x * inverse)
    return tl.minimum(tl.maximum(tl.where(code == code, code, 0.0), -LEVELS // 2), LEVELS // 2 - 1)


@triton.jit
def _part(x, group):
    """[N, numbers] of x [N, groups, numbers]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :, None] == group, x, 0.0), 1)


@triton.jit
def _with_part(x, group, part):
    """x [N, groups, numbers] with another part."""
    return tl.where(tl.arange(0, x.shape[1])[None, :, None] == group, part[:, None, :], x)


@triton.jit
def _number_of(x, n):
    """Number n of each row of x [N, D], [N, 1]. A row is one warp's, a number one lane's: no other warp waits."""
    return tl.gather(x, tl.full((x.shape[0], 1), 0, tl.int32) + n, 1)


@triton.jit
def _lost(left, x, scale, inverse, STORE: tl.constexpr):
    """Errors of numbers x where `left` is rounded, with their first 16 significant bits; 0 for those that are not finite."""
    error = (_rounded(left, inverse, STORE) + 0.5) * scale - x
    short = (error.to(tl.int32, bitcast=True) & -0x100).to(tl.float32, bitcast=True)
    return tl.where(error - error == 0, short, 0.0)


@triton.jit
def _made_up_for(x, scale, inverse, feedback, STORE: tl.constexpr):
    """Rotated keys x [N, groups, GROUP] less what errors of the numbers behind each add to it: `fed_back` of key_rounding.py,
    whose every product is exact. scale, inverse: [N, groups]; feedback: [width, width], of the head."""
    made, errors = x, tl.zeros_like(x)
    LAST: tl.constexpr = STORE.width // GROUP - 1
    for behind in range(0, LAST + 1):
        group = LAST - behind
        at = feedback + group * GROUP + tl.arange(0, GROUP)[None, :]
        numbers, wide, by = _part(x, group), _part(scale[:, :, None], group), _part(inverse[:, :, None], group)
        left = numbers
        for other in range(0, behind):
            lost = _part(errors, LAST - other)
            for n in range(0, GROUP):
                j = GROUP - 1 - n
                left -= tl.load(at + ((LAST - other) * GROUP + j) * STORE.width) * _number_of(lost, j)
        for n in range(0, GROUP):
            j = GROUP - 1 - n
            # Feedback to numbers from j on is zero.
            lost = _lost(left, numbers, wide, by, STORE)
            left -= tl.load(at + (group * GROUP + j) * STORE.width) * _number_of(lost, j)
        made, errors = _with_part(made, group, left), _with_part(errors, group, _lost(left, numbers, wide, by, STORE))
    return made


@triton.jit
def _bits(scale):
    return (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _bytes_of(codes, STORE: tl.constexpr):
    """[N, code bytes] uint8 of what `_rounded` gives [N, D]."""
    N: tl.constexpr = codes.shape[0]
    D: tl.constexpr = codes.shape[1]
    codes = codes.to(tl.int32) + (1 << (STORE.bits - 1))
    if STORE.bits == 4:
        low, high = tl.split(tl.permute(tl.reshape(codes, (N, D // GROUP, 2, 16)), (0, 1, 3, 2)))
        codes = tl.reshape(low | (high << 4), (N, D // 2))
    return codes.to(tl.uint8)


@triton.jit
def write_stored(tiles, at, slots, real, keys, values, feedback, STORE: tl.constexpr):
    """Tokens [N, D] float32, not rotated and zero behind head_dim, quantised into store slots [N] whose tiles begin at `at`.
    feedback: of errors in keys, [width, width] of the head; None: every number is rounded by itself."""
    N: tl.constexpr = keys.shape[0]
    D: tl.constexpr = keys.shape[1]
    GROUPS: tl.constexpr = D // GROUP
    at, token, real = at[:, None], (slots % TILE)[:, None], real[:, None]
    grouped = tl.reshape(rotated(keys, STORE.block), (N, GROUPS, GROUP))
    scales, by = _scales(grouped, STORE)
    if feedback is not None:
        grouped = _made_up_for(grouped, scales, by, feedback, STORE)
    key_bytes = _bytes_of(tl.reshape(_rounded(grouped, by[:, :, None], STORE), (N, D)), STORE)
    values = tl.reshape(rotated(values, STORE.block), (N, 1, D))
    scale, by = _scales(values, STORE)
    value_bytes = _bytes_of(tl.reshape(_rounded(values, by[:, :, None], STORE), (N, D)), STORE)
    _write(tiles, at, token, real, key_bytes, value_bytes, _bits(scales), _bits(scale), STORE)


@triton.jit
def _write(tiles, at, token, real, key_bytes, value_bytes, scales, scale, STORE: tl.constexpr):
    """Code bytes [N, bytes] and bits of scales [N, groups], [N, 1] into tokens [N, 1] of tiles."""
    byte, group = tl.arange(0, key_bytes.shape[1])[None, :], tl.arange(0, scales.shape[1])[None, :]
    mask = real & (byte < STORE.code_bytes)
    tl.store(tiles.codes + at + _key_byte(byte, token), key_bytes, mask=mask)
    tl.store(tiles.codes + at + _value_byte(byte, token, STORE), value_bytes, mask=mask)
    tl.store(tiles.scales + _scale_at(at, group, token, STORE), scales, mask=real & (group < STORE.width // GROUP))
    tl.store(tiles.scales + _scale_at(at, STORE.width // GROUP, token, STORE), scale, mask=real)


@triton.jit
def stored_bytes(tiles, at, slots, real, D: tl.constexpr, STORE: tl.constexpr):
    """What `move_stored` takes of store slots [N] whose tiles begin at `at`."""
    at, token, real = at[:, None], (slots % TILE)[:, None], real[:, None]
    byte, group = tl.arange(0, D * STORE.bits // 8)[None, :], tl.arange(0, D // GROUP)[None, :]
    mask = real & (byte < STORE.code_bytes)
    key_bytes = tl.load(tiles.codes + at + _key_byte(byte, token), mask=mask, other=0)
    value_bytes = tl.load(tiles.codes + at + _value_byte(byte, token, STORE), mask=mask, other=0)
    mask = real & (group < STORE.width // GROUP)
    scales = tl.load(tiles.scales + _scale_at(at, group, token, STORE), mask=mask, other=0)
    scale = tl.load(tiles.scales + _scale_at(at, STORE.width // GROUP, token, STORE), mask=real, other=0)
    return key_bytes, value_bytes, scales, scale


@triton.jit
def move_stored(tiles, at, slots, real, taken, STORE: tl.constexpr):
    """`stored_bytes` into other store slots [N], bit for bit."""
    _write(tiles, at[:, None], (slots % TILE)[:, None], real[:, None], taken[0], taken[1], taken[2], taken[3], STORE)
