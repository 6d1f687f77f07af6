"""The Triton kernels compile to machine code for Hopper; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OVER_STORES = {"_partials", "_chunk", "_observe", "_sums", "_terms", "_consolidate", "_consolidate_layers"}
OVER_STORES |= {"_reduce"}
KERNELS = {(name, 0, False, False) for name in {"_write", "_plan", "_due"} | OVER_STORES}
KERNELS |= {(name, 4, own, False) for name in OVER_STORES for own in (False, True)}
KERNELS |= {(name, 8, own, False) for name in OVER_STORES - {"_chunk"} for own in (False, True)}
KERNELS |= {("_move_lent", bits, True, False) for bits in (4, 8)}
FEEDS_BACK = ("_consolidate", "_fill_tiles", "_consolidate_layers")
KERNELS |= {(name, bits, own, True) for name in FEEDS_BACK for bits in (4, 8) for own in (False, True)}
MOST_SHARED_BYTES = 227 << 10  # what a block of an H100 can have


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper(tmp_path):
    script = Path(__file__).parents[1] / "support/compile_triton.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", str(script), "90"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(k["kernel"], k["store_bits"], k["own_budgets"], k["fed_back"]) for k in made} == KERNELS
    for kernel in made:
        assert kernel["arch"] == 90 and kernel["cubin_bytes"] > 1000 and kernel["shared_bytes"] <= MOST_SHARED_BYTES, (
            kernel
        )
