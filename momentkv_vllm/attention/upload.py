"""A step's work lists, made on the host, to the device by one copy."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available

from momentkv_vllm.kernels.worklists import mapped

PAGE_FIELDS = {"pages", "moment_pages", "store_pages", "retiring_pages"}
"""Fields of work lists that hold pages: only the device knows their numbers, so the host gives places in a table of them."""

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel anew for an address that is no multiple of it."""


def uploaded(lists: list[Any], table: torch.Tensor) -> list[Any]:
    """Work lists (kernels/worklists.py) on the device of `table`.

    A copy from pageable memory waits for the device, so all of them go as one from pinned memory, which does not.

    Args:
        lists: on the host. PAGE_FIELDS hold places in `table` and come back as page numbers.
        table: [places] int64.
    """
    columns: dict[tuple[bool, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def sort(name: str, x: torch.Tensor) -> torch.Tensor:
        columns[name in PAGE_FIELDS, x.dtype].append(x)
        return x

    for work in lists:
        mapped(work, sort)
    host = [_joined(tensors) for tensors in columns.values()]
    there = _copied(np.concatenate(host), table.device).split([len(x) for x in host])
    parts: dict[tuple[bool, torch.dtype], Iterator[torch.Tensor]] = {}
    for (are_pages, dtype), column in zip(columns, there, strict=True):
        flat = column.view(dtype)
        parts[are_pages, dtype] = _parted(table[flat] if are_pages else flat, columns[are_pages, dtype])
    return [mapped(work, lambda name, x: next(parts[name in PAGE_FIELDS, x.dtype])) for work in lists]


def _joined(tensors: list[torch.Tensor]) -> np.ndarray:
    """Bytes of tensors of one type, each beginning at a multiple of ALIGNMENT."""
    joined = np.zeros(sum(_room(x) for x in tensors), np.uint8)
    at = 0
    for x in tensors:
        joined[at : at + x.nbytes] = x.contiguous().numpy().reshape(-1).view(np.uint8)
        at += _room(x)
    return joined


def _room(x: torch.Tensor) -> int:
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def _copied(data: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(data)
    if device.type != "cpu" and is_pin_memory_available():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _parted(flat: torch.Tensor, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Parts of `flat` in the shapes of `tensors`."""
    at = 0
    for x in tensors:
        yield flat[at : at + x.numel()].view(x.shape)
        at += _room(x) // x.itemsize
