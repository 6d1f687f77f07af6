"""After a start, no request waits for Triton's compiler."""

import subprocess
import sys
from pathlib import Path


def test_serving_compiles_nothing_that_the_warm_up_has_not(models):
    """Prompts evict as answers do, then by a grain of their own; then heads have budgets of their own. In a process of its own: Triton is told of a GPU that is not here
    (triton_variants.py)."""
    script = Path(__file__).parents[1] / "support/triton_variants.py"
    done = subprocess.run([sys.executable, "-P", str(script), str(models())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line.split()[0]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(counts) == 6 and min(counts[::2]) >= 7 and not any(counts[1::2]), done.stdout[-2000:]
