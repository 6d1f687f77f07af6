"""What Triton would compile, by launch: `triton_variants.py MODEL` prints how many kernels the warm-up asks for, and those that
serving asks for after it; first without, then with a grain of their own for prompts, then with heads of their own budgets.

No GPU and no compiler: Triton decides by types, alignment and constants whether it has compiled a launch before, and so does this.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # -P leaves it out
import torch
import triton
from compile_triton import Target
from layer_sides import HEADS, Side, common_of, config_of, new_cache, new_tokens
from triton.runtime.jit import JITFunction
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.attention.warm_up import warm_up
from momentkv_vllm.head_budgets import HeadBudgets
from momentkv_vllm.kernels.triton import Triton
from momentkv_vllm.plugin import register

seen: set[str] = set()
fresh: list[str] = []


def noted(self, *args, grid, warmup, **options):
    """In place of JITFunction.run: notes what it would compile."""
    if not hasattr(self, "_binder"):
        self._binder = self.create_binder()[-1]
    _, specialization, given = self._binder(*args, **options)
    key = f"{self.fn.__name__} {specialization} {sorted(given.items())}"
    if key not in seen:
        seen.add(key)
        fresh.append(key)


def main(model: str) -> None:
    triton.runtime.driver.set_active(Target(90))
    JITFunction.run = noted
    Triton.objections = lambda self: []
    Triton.runs_on = lambda self, device: True
    TritonAttentionImpl.forward = lambda *given: given[7].zero_()
    register()
    for grain, heads in ((None, "equal"), (64, "equal"), (None, "measured")):
        serve(model, grain, heads)


def serve(model: str, grain: int | None, heads: str) -> None:
    """As a server that has compiled nothing; `grain`: prefill_retire_tokens, `heads`: head_budgets."""
    seen.clear()
    fresh.clear()
    rounds = {"key_rounding": "nearest"} if heads == "measured" else {}
    config = config_of(model, budget_tokens=512, prefill_retire_tokens=grain, head_budgets=heads, **rounds)
    side = Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
    width = side.impl.layout.packed.width
    side.impl.feedback = torch.zeros(HEADS, width, width)
    if heads == "measured":
        schedule = side.builder.planner.schedules[0]
        tiles = schedule.store_tokens // 8 + torch.tensor([-10, 10])
        side.impl.heads = [HeadBudgets(8 * tiles, torch.zeros(2, int(tiles[1]), 3).long(), schedule.equal_tokens)]
    table = torch.arange(1, 3 * 64 + 1).view(3, 64)
    side.cache = new_cache(table)
    warm_up(side.impl, side.builder.planner, side.cache)
    print(len(fresh), "before the first request")
    fresh.clear()
    generator, lens = torch.Generator().manual_seed(0), [0, 0, 0]
    # Lists of 1, 16, 32 and other numbers of pages; steps of 16, 32 and other numbers of tokens.
    for new in (
        [17, 250, 512],
        [16, 230, 3],
        [1, 30, 1],
        [1, 32, 15],
        [1, 3, 28],
        [300, 4, 2],
        [250, 1, 40],
        [2, 17, 1],
    ):
        lens = [a + b for a, b in zip(lens, new)]
        prompts = grain and [545, 250, 560]
        side.step(common_of(lens, new, table, prompts), *new_tokens(sum(new), generator))
    print(len(fresh), "while serving")
    print(*fresh, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
