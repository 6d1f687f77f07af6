"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch (torchvision_without_cuda.py)."""

from setuptools import setup

setup(
    name="torchvision-without-cuda",
    version="0.28.0",
    description="Operator names that torchvision's Python code expects when its CUDA library cannot be loaded",
    py_modules=["torchvision_without_cuda"],
    # torch calls these at the end of `import torch`, in every process: servers' workers too.
    entry_points={"torch.backends": ["torchvision_without_cuda = torchvision_without_cuda:declare_operators"]},
)
