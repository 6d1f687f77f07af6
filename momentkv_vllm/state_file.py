"""The file of a prefix's state: safetensors, with a header of JSON in its metadata. Every worker writes and reads its own.

A header says of what the state is: who wrote it, of which model, settings and tokens, and where its pages stand. Nothing of a
file is used before its checksum, its header and the sizes of its tensors are what they must be. The checksum is no signature: who
may write to the folder can make answers up.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from momentkv_vllm.refuse import refuse

FORMAT = 2
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
HEADER, CHECKSUM, TOKENS = "momentkv_state", "momentkv_checksum", "tokens"

Header = dict[str, Any]


def path_of(folder: str, name: str, rank: int, ranks: int) -> Path:
    """Of a worker's part of a state. Raises ValueError on a name that is not a plain one: none leads out of the folder."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        refuse(f"{name!r} is no name of a state", "use up to 100 letters, digits, - and _")
    part = "" if ranks == 1 else f".{rank + 1}-of-{ranks}"
    path = Path(folder) / f"{name}{part}.safetensors"
    if path.is_symlink():
        refuse(f"{path.name} is a link", "put the file itself there")
    return path


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> int:
    """Write the file at once or not at all; returns its bytes. Only its owner may read it: it holds a text's tokens."""
    text, tensors = json.dumps(header, sort_keys=True), {name: t.contiguous() for name, t in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, {HEADER: text, CHECKSUM: _checksum(text, tensors)})
        temporary.chmod(0o600)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def read(path: Path, expected: Header, shapes: Mapping[str, list[int]]) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors. Raises ValueError naming what is not as `expected`, the file's being damaged included.

    shapes: of the bytes of a page, by tensor; a tensor holds any number of pages."""
    text, tensors = _parts(path)
    header: Header = json.loads(text)
    for key, value in _flat(expected).items():
        found = _flat(header).get(key)
        if found != value:
            refuse(
                f"state {path.name} was saved with {key} {found!r}, this server has {value!r}",
                "save it again here",
                "serve as it was saved",
            )
    if set(tensors) != {*shapes, TOKENS}:
        refuse(f"state {path.name} has other layers than this server's model", "save it again here")
    for name, shape in shapes.items():
        if tensors[name].dtype != torch.uint8 or list(tensors[name].shape[1:]) != list(shape):
            refuse(f"state {path.name} has other pages in {name} than this server", "save it again here")
    return header, tensors


def listed(folder: str) -> Iterator[Header]:
    """The states in a folder, by their first workers' parts: "name", "bytes", and what their headers say, or "error"."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        name, *part = path.name.removesuffix(".safetensors").split(".")
        if not NAME.fullmatch(name) or (part and not part[0].startswith("1-of-")):
            continue
        found: Header = {"name": name, "bytes": path.stat().st_size}
        try:
            with _opened(path) as file:
                header = json.loads((file.metadata() or {})[HEADER])
            yield {**found, **{key: header[key] for key in ("model_name", "tokens", "ranks")}}
        except (SafetensorError, OSError, ValueError, KeyError):
            yield {**found, "error": f"{path.name} is no state"}


def token_hash(tokens: list[int]) -> str:
    return sha256(torch.tensor(tokens, dtype=torch.int64).numpy()).hexdigest()


def _parts(path: Path) -> tuple[str, dict[str, Tensor]]:
    try:
        with _opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        refuse(f"there is no state file {path.name}", "ask for the list: momentkv states list")
    except (SafetensorError, OSError) as error:
        refuse(f"state {path.name} cannot be read ({error})", "save it again")
    if HEADER not in metadata:
        refuse(f"{path.name} is no state", "save one: momentkv states save")
    if metadata.get(CHECKSUM) != _checksum(metadata[HEADER], tensors):
        refuse(f"state {path.name} is damaged: its checksum is wrong", "save it again")
    return metadata[HEADER], tensors


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path.name)
    return safe_open(path, "pt")


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def _flat(header: Header) -> Header:
    """Settings as keys of their own: "kv_eviction.budget_tokens"."""
    found = {key: value for key, value in header.items() if not isinstance(value, dict)}
    return found | {
        f"{k}.{key}": v for k, inner in header.items() if isinstance(inner, dict) for key, v in inner.items()
    }
