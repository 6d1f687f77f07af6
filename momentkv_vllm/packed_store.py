"""Byte layout of quantised store pages: tiles of eight tokens, ordered for integer dot products.

Store pages belong to one sequence and only our kernels read them, so they need not look like vLLM's. A head's part of a
store page holds whole tiles. A token's key, less its centre (key_centres.py), and its value are padded with zeros to `width`
numbers and rotated (rotation.py). Every group of 32 numbers of a key has a scale, a value has one: errors in keys cost ten times
as much. A tile holds, one after the other,

    key codes     [code_bytes / 4][8 tokens][4]       uint8: four bytes of a token side by side, for dot products with queries
    value codes   [4 pairs of tokens][code_bytes][2]  uint8: two tokens side by side, for dot products with weights
    key scales    [groups][8 tokens]                  bfloat16
    value scales  [8 tokens]                          bfloat16

A number is scale * (code - middle). int8: byte j is number j's code, middle 127.5. int4: of group g's 16 bytes, byte j holds
number 32 g + j in its low half and number 32 g + 16 + j in its high half, middle 7.5.
"""

from dataclasses import dataclass

import torch

from momentkv_vllm.key_rounding import fed_back
from momentkv_vllm.rotation import rotated

TILE_TOKENS = 8
GROUP = 32
"""Numbers of a key that share a scale."""
_LEVELS = {"int8": 254, "int4": 16}
"""254, not 256: signed codes of -127 .. 126 times signed queries stay within the 16 bits of AVX2's pairs."""
_SCALE_BYTES = 2


@dataclass(frozen=True)
class PackedLayout:
    """Sizes of a tile. `dtype`: "int8" or "int4"."""

    dtype: str
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers of a padded key or value."""
        return -(-self.head_dim // GROUP) * GROUP

    @property
    def groups(self) -> int:
        return self.width // GROUP

    @property
    def levels(self) -> int:
        return _LEVELS[self.dtype]

    @property
    def bits(self) -> int:
        return 8 if self.dtype == "int8" else 4

    @property
    def middle(self) -> float:
        """What is subtracted from a code."""
        return 127.5 if self.dtype == "int8" else 7.5

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one key, and of one value."""
        return self.width if self.dtype == "int8" else self.width // 2

    @property
    def tile_bytes(self) -> int:
        return TILE_TOKENS * (2 * self.code_bytes + (self.groups + 1) * _SCALE_BYTES)

    @property
    def values_offset(self) -> int:
        """Byte of a tile where value codes begin."""
        return TILE_TOKENS * self.code_bytes

    @property
    def scales_offset(self) -> int:
        """Byte of a tile where key scales begin; value scales follow."""
        return 2 * TILE_TOKENS * self.code_bytes

    def tiles_per_page(self, part_bytes: int) -> int:
        """Tiles that fit into a head's part of a page."""
        return part_bytes // self.tile_bytes

    def tokens_per_page(self, part_bytes: int) -> int:
        return self.tiles_per_page(part_bytes) * TILE_TOKENS


def quantised(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes -levels / 2 .. levels / 2 - 1 like `x`, scales bfloat16 without the last dimension) of float32 numbers, one scale
    per vector: a number is about scale * (code + 1 / 2).

    The scale is rounded up, so that no number lies beyond the last level; there is no level at zero.
    """
    scale = rounded_up(x.abs().amax(-1) * (2 / (levels - 1)))
    wide = scale.float()
    inverse = torch.where(wide > 0, 1 / wide, 0.0).unsqueeze(-1)
    # Rounding down comes between the product and any addition: no compiler can fuse them.
    codes = (x * inverse).floor().nan_to_num(nan=0.0).clamp(-levels // 2, levels // 2 - 1)
    return codes, scale


def rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 as the next bfloat16 that is not smaller; NaN stays one."""
    bits = x.contiguous().view(torch.int32)
    up = (bits + 0xFFFF) & -0x10000
    return torch.where(x.isnan(), x, up.view(torch.float32)).to(torch.bfloat16)


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


@dataclass
class Packed:
    """Quantised tokens.

    keys, values: [..., tokens, width] uint8 codes
    key_scales:   [..., tokens, groups] bfloat16
    value_scales: [..., tokens, 1] bfloat16
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, layout: PackedLayout, feedback: torch.Tensor | None = None
    ) -> "Packed":
        """keys, values: [rows, heads, tokens, head_dim] float32, not rotated. feedback: of errors in keys
        (key_rounding.py); None: every number is rounded by itself."""

        def codes(x: torch.Tensor, groups: int, feedback: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            numbers = rotated(padded(x, layout.width))
            found, scales = quantised(numbers.unflatten(-1, (groups, -1)), layout.levels)
            found = found.flatten(-2)
            if feedback is not None:
                each = scales.repeat_interleave(layout.width // groups, -1)
                found = fed_back(numbers, each, feedback, layout.levels)
            return (found + (layout.middle + 0.5)).to(torch.uint8), scales

        k, key_scales = codes(keys, layout.groups, feedback)
        v, value_scales = codes(values, 1, None)
        return cls(k, v, key_scales, value_scales)

    @classmethod
    def from_tiles(cls, tiles: torch.Tensor, layout: PackedLayout) -> "Packed":
        """tiles: [..., tiles, tile_bytes] uint8."""
        num_bytes = layout.code_bytes
        keys, values, scales = tiles.tensor_split((layout.values_offset, layout.scales_offset), -1)
        keys = keys.unflatten(-1, (num_bytes // 4, TILE_TOKENS, 4)).transpose(-3, -2).flatten(-2)
        values = values.unflatten(-1, (TILE_TOKENS // 2, num_bytes, 2)).transpose(-2, -1).flatten(-3, -2)
        scales = scales.contiguous().view(torch.bfloat16).unflatten(-1, (-1, TILE_TOKENS)).transpose(-2, -1)
        by_token = (x.flatten(-3, -2) for x in (keys, values, scales[..., :-1], scales[..., -1:]))
        keys, values, key_scales, value_scales = by_token
        return cls(_codes_of(keys, layout), _codes_of(values, layout), key_scales, value_scales)

    def to_tiles(self, layout: PackedLayout) -> torch.Tensor:
        """[..., tiles, tile_bytes] uint8; tokens are a multiple of a tile's."""
        keys, values = (_bytes_of(x, layout).unflatten(-2, (-1, TILE_TOKENS)) for x in (self.keys, self.values))
        keys = keys.unflatten(-1, (-1, 4)).transpose(-3, -2).flatten(-3)
        values = values.unflatten(-2, (-1, 2)).transpose(-2, -1).flatten(-3)
        scales = torch.cat([self.key_scales, self.value_scales], -1)
        scales = scales.unflatten(-2, (-1, TILE_TOKENS)).transpose(-2, -1).flatten(-2)
        return torch.cat([keys, values, scales.contiguous().view(torch.uint8)], -1)

    def numbers(self, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values, float32 [..., tokens, width]."""
        keys = (
            self.keys.unflatten(-1, (layout.groups, -1)).float() - layout.middle
        ) * self.key_scales.float().unsqueeze(-1)
        return keys.flatten(-2), (self.values.float() - layout.middle) * self.value_scales.float()


def _codes_of(packed: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """[..., width] codes of [..., code_bytes] bytes."""
    if layout.dtype == "int8":
        return packed
    halves = packed.unflatten(-1, (-1, GROUP // 2))
    return torch.cat([halves & 15, halves >> 4], -1).flatten(-2)


def _bytes_of(codes: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Inverse of `_codes_of`."""
    if layout.dtype == "int8":
        return codes
    low, high = codes.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


@dataclass
class PackedPages:
    """A layer's pages as tiles. raw: [num_pages, num_kv_heads, bytes a head owns of a page] uint8 view of the cache."""

    raw: torch.Tensor
    layout: PackedLayout

    @property
    def page_tiles(self) -> int:
        return self.layout.tiles_per_page(self.raw.shape[2])

    @property
    def page_tokens(self) -> int:
        """Tokens of a store page."""
        return self.page_tiles * TILE_TOKENS

    def read(self, pages: torch.Tensor) -> Packed:
        """Tokens of store pages [rows, n]: [rows, heads, n * page_tokens, ...]; unwritten slots are what their bytes say."""
        used = self.page_tiles * self.layout.tile_bytes
        tiles = self.raw[pages][..., :used].unflatten(-1, (-1, self.layout.tile_bytes))
        return Packed.from_tiles(tiles.transpose(1, 2).flatten(2, 3), self.layout)

    def write(self, pages: torch.Tensor, packed: Packed) -> None:
        """Inverse of `read`; a token's bytes are copied, not quantised again."""
        tiles = packed.to_tiles(self.layout).unflatten(2, (pages.shape[1], -1)).flatten(3).transpose(1, 2)
        raw = self.raw[pages]
        raw[..., : tiles.shape[-1]] = tiles
        self.raw[pages] = raw
