"""Kernel families and what they share. base.py is the interface, reference.py the specification; `select` chooses a family."""

from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cpu import Cpu
from momentkv_vllm.kernels.cuda import Cuda
from momentkv_vllm.kernels.limits import CacheShape
from momentkv_vllm.kernels.reference import Reference
from momentkv_vllm.kernels.triton import Triton

FAMILIES: tuple[KernelFamily, ...] = (Triton(), Cuda(), Cpu(), Reference())
"""In order of preference."""


def select(name: str = "auto", device: str = "cpu", shape: CacheShape | None = None) -> KernelFamily:
    """The family `name`, for tensors on `device` and, if it is known, a cache of that shape. "auto" takes the first that can
    serve them, a family that is named never falls back. Raises ValueError if it is unknown or objects."""
    for family in preferred(device) if name == "auto" else [f for f in FAMILIES if f.name == name]:
        why = family.refusals(device, shape)
        if not why:
            return family
        if name != "auto":
            raise ValueError(
                f"kernel family {name!r} cannot run here: {'; '.join(why)}; use 'auto', or serve without --kv-eviction"
            )
    raise ValueError(f"no kernel family {name!r} works here; `momentkv doctor` says why")


def preferred(device: str) -> list[KernelFamily]:
    """What "auto" tries on a device, best first."""
    return [family for family in FAMILIES if device in family.devices and not family.by_name_only]
