"""Files that a Markdown document of ours names in backquotes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASES = (ROOT, ROOT / "momentkv_vllm")
"""Names start at the repository's root, or at the package where the context is the package."""

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(p for name in ("docs", "csrc", "docker", "benchmarks", "tests") for p in (ROOT / name).rglob("*.md")),
]


def named_files(document: Path) -> list[str]:
    """What is in backquotes, has a slash, and begins with a folder that we have: `tests/support/engine.py`, `attention/layer.py:12`.
    Not in `build/`, where programs write."""
    words = re.findall(r"`([\w.-]+/[\w./-]*)(?::\d+)?`", document.read_text())
    firsts = {word: word.split("/")[0] for word in words}
    return [word for word, first in firsts.items() if first != "build" and any((b / first).is_dir() for b in BASES)]


def missing_files(document: Path) -> list[str]:
    """Those that do not exist, neither from one of BASES nor beside the document."""
    return [name for name in named_files(document) if not any((b / name).exists() for b in (*BASES, document.parent))]
