"""Finished cells on disk, so that a run goes on where the last one stopped."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evaluation.quality.cells import Cell

import momentkv_vllm
from momentkv_vllm.calibrate.items import Item
from momentkv_vllm.calibrate.verdict import Reference

REPOSITORY = Path(__file__).resolve().parents[3]
ROOT = REPOSITORY / "build/judge"
SIMULATOR = [REPOSITORY / f"benchmarks/research/{name}.py" for name in ("simulate", "states")]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def code() -> str:
    """Digest of everything that evicts: a cell of other code is not finished."""
    package = Path(momentkv_vllm.__file__).parent
    files = [p for p in sorted(package.rglob("*")) if p.suffix in (".py", ".so") and p.parent.name != "calibrate"]
    return _digest(*(p.read_bytes() for p in [*files, *SIMULATOR]))


class Shelf:
    """Results of one kind of item, for one model, backend and dtype.

    any_code: take results of other code than today's as finished.
    """

    def __init__(
        self, model: str, kind: str, items: Sequence[Item], backend: str, dtype: str, any_code: bool = False
    ) -> None:
        weights = [(p.name, p.stat().st_size) for p in sorted(Path(model).glob("*.safetensors"))]
        # Not the whole path: a checkout may move.
        key = _digest(json.dumps([Path(model).name, weights, [asdict(i) for i in items]]).encode())
        self.folder = ROOT / f"{kind}_{backend}_{dtype}_{key}"
        self.any_code = any_code

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name.replace(' / ', '_').replace(' ', '-')}.json"

    def results(self, cell: Cell) -> list[dict[str, Any]] | None:
        """By item; None if the cell is not finished."""
        if not self._path(cell).exists():
            return None
        saved = json.loads(self._path(cell).read_text())
        # What keeps all tokens runs no code of ours.
        current = self.any_code or not cell.prefill or saved["code"] == code()
        return saved["items"] if current else None

    def seconds(self, cell: Cell) -> tuple[float, float]:
        """(wall, CPU): on a busy machine only the second can be compared."""
        saved = json.loads(self._path(cell).read_text())
        return saved["seconds"], saved["cpu_seconds"]

    def save(self, cell: Cell, results: list[dict[str, Any]], seconds: float, cpu_seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        saved = {"cell": cell.name, "code": code(), **times, "items": results}
        self._path(cell).write_text(json.dumps(saved, indent=1) + "\n")

    def save_reference(self, reference: Reference) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save({"ids": reference.ids, "log_probs": reference.log_probs}, self.folder / "reference.pt")

    def reference(self) -> Reference | None:
        path = self.folder / "reference.pt"
        return Reference(**torch.load(path)) if path.exists() else None
