"""What a GPU must choose, declared: the variants that benchmarks/gpu sweeps, and the one that runs. None of them is measured yet.

A row's result may differ in the last bit between variants, never with the batch beside it.
"""

from typing import NamedTuple


class Tuning(NamedTuple):
    """tile: slots of a tile, at most (half as many above 128 dimensions, for shared memory); stages: of the software pipeline, of
    which the page table's loads take one; split: of decode, slots that a program attends to; rows: of a chunk, pairs of a query
    and a head of its group that a program holds."""

    tile: int = 64
    stages: int = 3
    split: int = 256
    rows: int = 64


DECODE = CHUNK = Tuning()

DECODE_VARIANTS = [
    Tuning(tile, stages, split)
    for split in (256, 512, 1 << 20)
    for tile, stages in ((64, 3), (64, 5), (32, 5), (32, 7))
]
CHUNK_VARIANTS = [
    Tuning(tile, stages, rows=rows) for rows in (64, 128) for tile, stages in ((64, 3), (64, 5), (32, 5), (32, 7))
]
