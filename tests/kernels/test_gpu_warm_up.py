"""After a start, no request waits for Triton's compiler."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("grain", [[], ["64"]])
def test_serving_compiles_nothing_that_the_warm_up_has_not(models, grain):
    """In a process of its own: Triton is told of a GPU that is not here (triton_variants.py)."""
    script = Path(__file__).parents[1] / "support/triton_variants.py"
    done = subprocess.run([sys.executable, "-P", str(script), str(models()), *grain], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, while_serving = (line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isdigit())
    assert int(before[0]) >= 7 and int(while_serving[0]) == 0, done.stdout[-2000:]
