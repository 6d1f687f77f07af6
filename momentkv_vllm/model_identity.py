"""Which weights a server serves: for files that are worth nothing under another model's."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

PIECES, PIECE_BYTES = 256, 1024
"""Of each weight file so much is read."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


def model_identity(model: Any) -> str:
    """A digest of a vLLM ModelConfig: the architecture's settings, how it is quantised, and which weights.

    For a model of a hub that is the commit; for a folder, samples of the weight files, evenly spaced."""
    settings = model.hf_config.to_dict()
    commit = settings.pop("_commit_hash", None) or getattr(model.hf_config, "_commit_hash", None)
    settings.pop("_name_or_path", None)
    folder = Path(model.model)
    known = json.dumps(
        [settings, str(model.quantization), None if folder.exists() else [model.model, commit]], default=str
    )
    digest = sha256(known.encode())
    files = [folder] if folder.is_file() else [f for kind in WEIGHT_FILES for f in sorted(folder.glob(kind))]
    for file in files:
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        digest.update(_samples(file))
    return digest.hexdigest()


def _samples(file: Path) -> bytes:
    step = max(PIECE_BYTES, file.stat().st_size // PIECES)
    found = b""
    with file.open("rb") as data:
        for start in range(0, file.stat().st_size, step):
            data.seek(start)
            found += data.read(PIECE_BYTES)
    return found
