"""Compile every Triton kernel to machine code of a GPU that is not here: `compile_triton.py 90` for sm_90.

Triton's compiler and ptxas come with its wheel; only launching needs a driver, so a stand-in names the target and launches
become compilations. Prints a JSON line a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[2] / "benchmarks" / folder) for folder in ("gpu", ""))
import torch
import triton
from cases import Case, Shape
from shape import SINKS
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from momentkv_vllm.attention.step_plan_on_device import DecodePlanner
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import HeadBudgets
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.triton import Triton
from momentkv_vllm.kernels.worklists import LayersOf
from momentkv_vllm.packed_store import PackedLayout
from momentkv_vllm.page_schedule import build_schedule
from momentkv_vllm.policies import find


class Target(DriverBase):
    """A driver that has one GPU and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(made) -> dict[str, int]:
    """Registers of a thread and bytes of its stack, where spills go, as cuobjdump reads them in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", text)[1]) for name, key in (("registers", "REG"), ("stack_bytes", "STACK"))
    }


STORED = 32
MOST_TILES = 1024
"""Of a head with a budget of its own: 8,192 tokens."""


def pack(case: Case, dtype: str, own_budgets: bool) -> None:
    """The first two pages of every row become a quantised store."""
    case.cache = CacheView.of_vllm_gpu(case.cache.kv, case.shape.layout, PackedLayout(dtype, case.shape.head_dim))
    case.mass = Observed.of(case.cache, "mass")
    if own_budgets:
        heads = case.shape.kv_heads
        places = torch.zeros(heads, MOST_TILES, 3, dtype=torch.int64)
        case.cache.heads = HeadBudgets(torch.full((heads,), 8 * MOST_TILES), places, STORED)
    case.work.stored, case.work.store_pages = torch.full((case.shape.rows,), STORED), 2
    case.work.last_slot -= 2 * case.shape.page_size


def main(capability: int, shapes: list[tuple[Shape, str, int, float, bool]]) -> None:
    """shapes: with the dtype of a quantised store, "" for none, its runs, where logits are capped, 0 for nowhere, and whether heads
    have budgets of their own."""
    triton.runtime.driver.set_active(Target(capability))
    launch = JITFunction.run
    seen = set()

    def compile_only(self, *args, grid, warmup, **options):
        made = launch(self, *args, grid=grid, warmup=True, **options)
        if made.hash not in seen:
            seen.add(made.hash)
            row = {"kernel": self.fn.__name__, "arch": made.metadata.target.arch, "shared_bytes": made.metadata.shared}
            store = options.get("STORE")
            row |= {
                "store_bits": store.bits if store else 0,
                "own_budgets": bool(store and store.own_budgets),
                "fed_back": dict(zip(self.arg_names, args, strict=False)).get("feedback") is not None,
                "cubin_bytes": len(made.asm["cubin"]),
            }
            print(json.dumps(row | resources(made)), flush=True)

    JITFunction.run = compile_only
    policy, family = find("momentkv"), Triton()
    for shape, dtype, run, softcap, own_budgets in shapes:
        case = Case(shape, "cpu")
        if dtype:
            pack(case, dtype, own_budgets)
        case.cache.softcap = softcap
        case.attend(family, True, lse=True)
        if shape.queries > 1:
            continue
        family.observe(case.cache, case.mass, case.query, case.lse, case.work, case.scale)
        retire = case.retire_work(1)
        if dtype:
            retire.stored, retire.run_tokens, retire.store_tokens = case.work.stored, run, STORED
        family.attend_and_observe(case.cache, case.mass, case.query, case.output, case.work, case.scale, True)
        family.write(case.cache, case.key, case.value, torch.tensor([20]), case.mass)
        retire.due = torch.zeros(1 + shape.rows, dtype=torch.int64)
        layers = LayersOf([case.cache] * 2, [case.mass] * 2, torch.zeros(2, 5, dtype=torch.int64))
        width = case.cache.packed_layout.width if dtype else 0
        for feedback in (None, torch.zeros(shape.kv_heads, width, width))[: 1 + bool(dtype)]:
            case.cache.feedback = feedback
            family.consolidate(case.cache, case.mass, retire, policy(), SINKS, case.scale)
            family.consolidate_layers(layers, retire, policy(), SINKS, case.scale)
    config = EvictionConfig(policy="momentkv", budget_tokens=256)
    planner = DecodePlanner(build_schedule(config, 16, 1, False), config, policy, 2, "cpu")
    table = torch.ones(2, 40, dtype=torch.int32)
    planner.update(torch.tensor([5, 6], dtype=torch.int32), torch.arange(3, dtype=torch.int32), table)


if __name__ == "__main__":
    small = {"head_dim": 64, "kv_heads": 1, "rows": 1, "slots": 64}
    served = small | {"head_dim": 128, "groups": 4}
    stores = [
        *((Shape(**served, queries=n), "int4", 8, 0.0, own) for own in (False, True) for n in (1, 3)),
        (Shape(**small), "int8", 1, 50.0, False),
        (Shape(**small), "int8", 8, 0.0, True),
    ]
    exact = [(Shape(**small), "", 1, 0.0, False), (Shape(**small, queries=3), "", 1, 50.0, False)]
    main(int(sys.argv[1]), [*exact, *stores])
