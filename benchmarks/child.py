"""A measurement in a process of its own: `python -m MODULE TASK`, and every result comes back when it is there."""

import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "RESULT "


def results(module: str, task: Any, before: Sequence[str] = (), **environment: str) -> Iterator[Any]:
    """What the child tells, as it comes. before: a command to start it with. Raises RuntimeError with its last lines."""
    # Not the repository's root: vLLM probes for a top-level module `triton_kernels`. What was carried to a machine stays
    # (gpu/pack.py).
    paths = [str(HERE), *filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [*before, sys.executable, "-P", "-m", module, json.dumps(task)]
    said: collections.deque[str] = collections.deque(maxlen=60)
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                said.append(line)
    if child.returncode:
        raise RuntimeError(f"{module} {json.dumps(task)} exited with {child.returncode}:\n{''.join(said)}")


def task() -> Any:
    """In the child: what to do. None: this is no child."""
    return json.loads(sys.argv[1]) if len(sys.argv) == 2 and sys.argv[1][:1] in "{[" else None


def tell(result: Any) -> None:
    print(MARK + json.dumps(result), flush=True)
