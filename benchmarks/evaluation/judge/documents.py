"""Real documents with questions and reference answers: L-Eval or LongBench, from a local copy."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HALVES = ("choose", "report")
"""Settings are chosen on the first half of the documents and reported on the second."""


@dataclass(frozen=True)
class Document:
    """name: its file and a digest of its text, the same wherever the text stands again; asks: (question, answer)."""

    name: str
    text: str
    asks: tuple[tuple[str, str], ...]

    @property
    def half(self) -> str:
        return HALVES[hashlib.sha256(self.name.encode()).digest()[0] % 2]


def load(folder: Path, half: str) -> list[Document]:
    """All documents of one half, in the order of their names.

    Args:
        folder: `*.jsonl` of L-Eval (https://github.com/OpenLMLab/LEval) or a checkout of LongBench (`data/*.jsonl`).

    Raises:
        FileNotFoundError: no such files there.
    """
    files = sorted(folder.glob("*.jsonl")) or sorted(folder.glob("data/*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"--documents {folder}: no *.jsonl and no data/*.jsonl; it wants a folder of L-Eval's tasks or a checkout of "
            "LongBench"
        )
    found: dict[str, list[tuple[str, str]]] = {}
    texts = {}
    for path in files:
        for row in map(json.loads, filter(str.strip, path.read_text().splitlines())):
            text, asks = _row(row)
            name = f"{path.stem}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            texts[name] = text
            found.setdefault(name, []).extend(asks)
    documents = [Document(name, texts[name], tuple(found[name])) for name in sorted(found)]
    return [d for d in documents if d.half == half]


def _row(row: dict) -> tuple[str, Iterator[tuple[str, str]]]:
    if "instructions" in row:  # L-Eval
        return row["input"], zip(row["instructions"], row["outputs"], strict=True)
    return row["context"], ((row["input"], str(row["answers"][0])) for _ in range(1))
