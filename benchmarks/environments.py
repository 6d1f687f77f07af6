"""Environments beside this one, for clients whose packages do not fit beside vLLM's."""

import functools
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


class NotMade(Exception):
    """What pip said, and the way out."""


@functools.cache
def programs(name: str) -> Path:
    """The folder `bin` of .venv-NAME, which has the packages of requirements/NAME.txt. Raises NotMade."""
    folder, wanted = ROOT / f".venv-{name}", ROOT / f"requirements/{name}.txt"
    if not (folder / "bin/python").exists():
        venv.create(folder, with_pip=True)
    pip = subprocess.run([folder / "bin/pip", "install", "-q", "-r", wanted], capture_output=True, text=True)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or [pip.stderr]
        raise NotMade(
            f"no packages of {wanted.relative_to(ROOT)}: {errors[-1].strip()}. Is the package index reachable?"
        )
    return folder / "bin"
