"""What a machine has, said before anything is asked of it, and where the numbers come from. Needs Python alone."""

import importlib.util
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "vllm", "transformers", "flashinfer-python", "xformers", "pip", "setuptools")
NO_TORCH = (
    "no torch here, which every run needs. It cannot be carried: a CUDA build and its libraries are gigabytes, a call takes "
    "64 MiB. Ask for a machine that has it"
)


def found() -> dict[str, Any]:
    asked = "--query-gpu=name,driver_version,memory.total"
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "nvcc": said(nvcc() or "nvcc", "--version").split("\n")[-1],
        "driver": said("nvidia-smi", asked, "--format=csv,noheader"),
    }


def look() -> None:
    """Printed line by line, so that also a run that goes no further has told it."""
    for key, value in found().items():
        print(f"{key}: {value}", flush=True)


def require(interpreted: bool) -> None:
    """Ends the run where it cannot work, and says why."""
    if not importlib.util.find_spec("torch"):
        raise SystemExit(NO_TORCH)
    if not importlib.util.find_spec("triton"):
        raise SystemExit(
            "torch, but no triton here: its wheel is larger than a call takes (64 MiB), ask for a machine with it"
        )
    start = time.monotonic()
    import torch

    works = torch.cuda.is_available()
    print(f"torch {torch.__version__} loaded in {time.monotonic() - start:.1f} s, CUDA {works}", flush=True)
    if not works and not interpreted:
        raise SystemExit("torch sees no GPU here (--interpret rehearses without one)")


def header(root: Path, interpreted: bool) -> dict[str, Any]:
    """For the JSON: what was found, the GPU's name, the commit (from build/commit where a copy came without git), the date."""
    import torch

    commit = said("git", "-C", str(root), "rev-parse", "HEAD")
    carried = root / "build" / "commit"
    return found() | {
        "gpu": "none (Triton's interpreter)" if interpreted else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "commit": commit or (carried.read_text().strip() if carried.exists() else ""),
        "date": datetime.now(UTC).date().isoformat(),
    }


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvcc() -> str | None:
    usual = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (usual if Path(usual).exists() else None)


def said(*command: str) -> str:
    """What a program prints; nothing where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
