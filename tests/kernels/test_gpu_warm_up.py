"""After a start, no request waits for Triton's compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_sides import HEADS, PAGE, D, Side, config_of

from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.attention.warm_up import warm_up
from momentkv_vllm.plugin import register


def test_serving_compiles_nothing_that_the_warm_up_has_not(models):
    """Prompts evict as answers do, then by a grain of their own; then heads have budgets of their own. In a process of its own: Triton is told of a GPU that is not here
    (triton_variants.py)."""
    script = Path(__file__).parents[1] / "support/triton_variants.py"
    done = subprocess.run([sys.executable, "-P", str(script), str(models())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line.split()[0]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(counts) == 6 and min(counts[::2]) >= 7 and not any(counts[1::2]), done.stdout[-2000:]


@pytest.mark.parametrize("pages", [5, 200])
def test_the_warm_up_leaves_nothing_in_the_cache_that_then_serves(models, pages):
    """Also in one with fewer pages than two sequences take; what is observed stays where it is, graphs and heads point there."""
    register()
    side = Side(
        config_of(models(), kernels="reference"), CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
    )
    cache, written = torch.zeros(pages, HEADS, PAGE, 2 * D), []
    write = side.impl.do_kv_cache_update
    side.impl.do_kv_cache_update = lambda *given: written.append(given[-1]) or write(*given)
    observed = side.impl.observing(side.impl.view_of(cache))
    warm_up(side.impl, side.builder.planner, cache)
    assert len(written) == 3 and all(int(slots.max()) < pages * PAGE and int(slots.min()) >= PAGE for slots in written)
    assert not cache.any() and side.impl.observed is observed
