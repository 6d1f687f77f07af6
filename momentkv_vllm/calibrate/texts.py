"""The user's texts: read from files, cut into stretches of one length."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from momentkv_vllm.refuse import refuse

KEYS = ("text", "input", "document")
"""Of a JSON object, the first that is there is its text."""
LEAST_CONTEXT, MOST_CONTEXT = 256, 2048
"""Tokens: shorter stretches cannot be calibrated on, longer ones only when asked for."""


def read(path: Path) -> list[str]:
    """Texts that are not empty. Raises ValueError if there are none, or no such file or folder."""
    if path.is_dir():
        found = [p.read_text(errors="replace") for p in sorted(path.glob("*.txt"))]
    elif path.suffix == ".jsonl" and path.exists():
        lines = path.read_text(errors="replace").splitlines()
        found = [_row(line, f"--texts {path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".txt" and path.exists():
        found = [path.read_text(errors="replace")]
    else:
        refuse(f"--texts {path} is no .txt file, .jsonl file or folder of .txt files", "name one that exists")
    found = [text for text in found if text.strip()]
    if not found:
        refuse(
            f"--texts {path} holds 0 texts, legal are 1 and more", "give a .txt, a .jsonl, or a folder of .txt files"
        )
    return found


def _row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        refuse(f"{where} is not JSON: {error}", "write one object per line")
    text = next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str):
        refuse(f"{where} has no text under any of {', '.join(KEYS)}", "name the text one of these")
    return text


def stretches(texts: Sequence[list[int]], context: int | None, count: int, before: int = 0) -> list[list[int]]:
    """At most `count` stretches that share no token: the first of each text, then the second of each.

    before: tokens that the caller puts before each; `context` counts them. context: None takes MOST_CONTEXT, or as much as
    `count` of the texts have. Shorter texts are left out. Raises ValueError if that is too short, or too long for every text.
    """
    lengths = sorted((before + len(t) for t in texts), reverse=True)
    context = context or min(MOST_CONTEXT, lengths[min(count, len(lengths)) - 1])
    if context < LEAST_CONTEXT:
        refuse(
            f"--context {context} is too short, legal is {LEAST_CONTEXT} tokens and more; the longest text has {lengths[0]}",
            "give longer texts",
            "set --context, which leaves out texts that are shorter",
        )
    if context > lengths[0]:
        refuse(
            f"--context {context} is too long, legal is {LEAST_CONTEXT} to {lengths[0]} tokens, the longest text's",
            "give longer texts",
        )
    size = context - before
    rounds = itertools.zip_longest(*([t[i : i + size] for i in range(0, len(t), size)] for t in texts))
    return [s for one in rounds for s in one if s is not None and len(s) == size][:count]
