"""Native build of momentkv-vllm; its metadata is in pyproject.toml.

The kernels are built against the torch of this environment (pip install --no-build-isolation) and need a C++20 compiler.
csrc/cpu: always; MOMENTKV_BUILD_CPU=0 leaves them out, on a CPU the PyTorch reference kernels serve then, slowly.
csrc/cuda: where that torch is a CUDA build and nvcc is found; MOMENTKV_BUILD_CUDA=1 insists, 0 leaves them out.
MOMENTKV_SANITIZE=1 builds csrc/cpu with AddressSanitizer and UBSan (tests/sanitize.sh).
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def native_build() -> dict:
    """Arguments of `setup` for the kernels in C++ and CUDA C++."""
    cpu, cuda = os.environ.get("MOMENTKV_BUILD_CPU", "1") != "0", os.environ.get("MOMENTKV_BUILD_CUDA", "auto")
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        if cpu or cuda == "1":
            raise SystemExit(
                "momentkv-vllm builds its kernels against the installed torch: install torch first and use "
                "`pip install --no-build-isolation`, or set MOMENTKV_BUILD_CPU=0 to install without them"
            ) from None
        return {}
    modules = [cpu_kernels()] if cpu else []
    if cuda_wanted(cuda):
        modules.append(cuda_kernels())
    # On GPU machines, with csrc/cpu left out, ninja compiles files side by side.
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=not cpu)}}


def files(folder: str, *suffixes: str) -> list[str]:
    """Sorted paths from the root."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).iterdir() if p.suffix in suffixes)


def cpu_kernels():
    """Every source file picks its own instruction set."""
    from torch.utils.cpp_extension import CppExtension

    compile_args = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
    compile_args += ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-g0"]
    link_args = ["-fopenmp"]
    if os.environ.get("MOMENTKV_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        compile_args += sanitize
        link_args += sanitize
    return CppExtension(
        "momentkv_vllm._cpu",
        files("csrc/cpu", ".cpp"),
        depends=files("csrc/common", ".h") + files("csrc/cpu", ".h", ".inc"),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def cuda_wanted(wanted: str) -> bool:
    """wanted: "auto", "0" or "1", which ends the build if there is nothing to build with."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if wanted == "1" and torch.version.cuda is None:
        raise SystemExit(
            f"MOMENTKV_BUILD_CUDA=1 needs a CUDA build of torch, this is {torch.__version__}: install one, or set it to 0"
        )
    return wanted == "1" or (wanted == "auto" and torch.version.cuda is not None and CUDA_HOME is not None)


def cuda_kernels():
    """TORCH_CUDA_ARCH_LIST chooses other architectures than those named here."""
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return CUDAExtension(
        "momentkv_vllm._cuda",
        files("csrc/cuda", ".cu", ".cpp"),
        depends=files("csrc/common", ".h") + files("csrc/cuda", ".h", ".cuh"),
        extra_compile_args={"cxx": ["-std=c++20", "-O2", "-g0"], "nvcc": ["-std=c++17", "-O3"]},
    )


setup(
    **native_build(),
    # vLLM probes for a top-level module `triton_kernels`, so ours is installed inside the package.
    packages=[*find_packages(include=["momentkv_vllm", "momentkv_vllm.*"]), "momentkv_vllm.triton_kernels"],
    package_dir={"momentkv_vllm.triton_kernels": "triton_kernels"},
)
