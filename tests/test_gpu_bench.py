"""`make bench-gpu` from its first line to its last, in Triton's interpreter: what a GPU machine will run."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "run.py"


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--interpret"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["interpreted"] and "interpreter" in results["machine"]["gpu"] and results["machine"]["commit"]
    assert len(results["checks"]) == 2 and all(c["worst_relative_difference"] < 2**-6 for c in results["checks"])
    parts = results["families"]["triton"]
    assert parts["replay"]["equal"] and parts["replay"]["retired_pages"] > 0 and not parts["replay"]["captured"]
    assert all(parts[name] for name in ("decode", "context", "retire")) and results["splits"]
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_wrong_kernel_stops_it_before_any_figure(tmp_path):
    """The gate in front of the timings: one number off, and nothing is timed."""
    broken = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; sys.path[:0] = {folders!r}\n"
        "import check, torch\n"
        "from momentkv_vllm.kernels import FAMILIES\n"
        "triton = FAMILIES[0]\n"
        "right = triton.attend\n"
        "def wrong(cache, query, output, *rest):\n"
        "    right(cache, query, output, *rest)\n"
        "    output[-1, -1, 3] += 1.0\n"
        "triton.attend = wrong\n"
        "check.run('cpu', tiny=True)\n"
    )
    code = broken.format(folders=[str(SCRIPT.parent), str(SCRIPT.parents[1])])
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "AssertionError" in done.stderr and "output" in done.stderr
