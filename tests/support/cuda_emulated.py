"""Builds csrc/cuda for the CPU: the same kernels and operators, a fiber for every CUDA thread (csrc/cuda/emulate.h)."""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
FLAGS = ["-std=c++20", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-DMOMENTKV_EMULATE"]


def build(folder: Path) -> Path:
    """Shared library that registers torch.ops.momentkv_cuda_emulated. Raises CalledProcessError with g++'s words."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    bindings = ["-O0", *(f"-isystem{path}" for path in includes), "-c", str(SOURCES / "bindings.cpp")]
    kernels = [["-O1", "-x", "c++", "-c", str(source)] for source in sorted(SOURCES.glob("*.cu"))]
    objects = [folder / f"{number}.o" for number in range(1 + len(kernels))]
    commands = [
        ["g++", *FLAGS, *arguments, "-o", str(to)] for arguments, to in zip([bindings, *kernels], objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    library = folder / "momentkv_cuda_emulated.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    _run(
        [
            "g++",
            "-shared",
            *map(str, objects),
            f"-L{torch_libraries}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(library),
        ]
    )
    return library


def compiler() -> str | None:
    return shutil.which("g++")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
