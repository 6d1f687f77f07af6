"""A step's work lists, made on the host, to the device by one copy."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available

from momentkv_vllm.attention.step_plan import StepPlan
from momentkv_vllm.kernels.worklists import Round, mapped

PAGE_FIELDS = {"pages", "moment_pages", "store_pages", "retiring_pages"}
"""Fields of work lists that hold pages: only the device knows their numbers, so the host gives places in a table of them."""

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel anew for an address that is no multiple of it."""


def upload_step(step: StepPlan, others: list[Any], table: torch.Tensor) -> list[Any]:
    """Move a step's lists to the device of `table`, and `others` along with them, which are returned."""
    lists = [work for r in step.rounds for work in (*r.attends, *r.retires)]
    moved = iter(uploaded(others + lists, table))
    there = [next(moved) for _ in others]
    step.rounds = [Round([next(moved) for _ in r.attends], [next(moved) for _ in r.retires]) for r in step.rounds]
    return there


def uploaded(lists: list[Any], table: torch.Tensor) -> list[Any]:
    """Work lists (kernels/worklists.py) on the device of `table`.

    A copy from pageable memory waits for the device, so all of them go as one from pinned memory, which does not. A block of
    it is every step's own: torch gives it to no later step before the device has read it.

    Args:
        lists: on the host. PAGE_FIELDS hold places in `table` and come back as page numbers; -1, which pads, stays.
        table: [places] int64.
    """
    columns: dict[tuple[bool, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def sort(name: str, x: torch.Tensor) -> torch.Tensor:
        columns[name in PAGE_FIELDS, x.dtype].append(x)
        return x

    for work in lists:
        mapped(work, sort)
    sizes = [sum(_room(x) for x in tensors) for tensors in columns.values()]
    host = _block(sum(sizes), table.device)
    for tensors, part in zip(columns.values(), host.split(sizes), strict=True):
        _join(tensors, part)
    there = host.to(table.device, non_blocking=True).split(sizes)
    parts: dict[tuple[bool, torch.dtype], Iterator[torch.Tensor]] = {}
    for (are_pages, dtype), column in zip(columns, there, strict=True):
        flat = column.view(dtype)
        numbers = torch.where(flat < 0, flat, table[flat]) if are_pages else flat
        parts[are_pages, dtype] = _parted(numbers, columns[are_pages, dtype])
    return [mapped(work, lambda name, x: next(parts[name in PAGE_FIELDS, x.dtype])) for work in lists]


def _join(tensors: list[torch.Tensor], joined: torch.Tensor) -> None:
    """Bytes of tensors of one type into `joined` [bytes], each beginning at a multiple of ALIGNMENT."""
    at, target = 0, joined.numpy()
    for x in tensors:
        target[at : at + x.nbytes] = x.contiguous().numpy().reshape(-1).view(np.uint8)
        at += _room(x)


def _room(x: torch.Tensor) -> int:
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def _block(size: int, device: torch.device) -> torch.Tensor:
    """[size] uint8 on the host. Zeros: what lies between lists is read as places, too."""
    return torch.zeros(size, dtype=torch.uint8, **_pinning(device))


def _pinning(device: torch.device) -> dict[str, bool]:
    return {"pin_memory": True} if device.type != "cpu" and is_pin_memory_available() else {}


def _parted(flat: torch.Tensor, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Parts of `flat` in the shapes of `tensors`."""
    at = 0
    for x in tensors:
        yield flat[at : at + x.numel()].view(x.shape)
        at += _room(x) // x.itemsize
