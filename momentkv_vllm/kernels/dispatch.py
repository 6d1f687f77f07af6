"""Kernel families behind one interface: `write`, `attend`, `observe`, `consolidate` (see reference.py, the specification).

A family declares what it cannot do: `objections` on this machine, `LIMITS` on a cache. `select("auto")` takes the first for
the device without objections, an explicitly named family never falls back.
"""

import os
from types import ModuleType

from momentkv_vllm.kernels import cpu, cuda, reference, triton
from momentkv_vllm.kernels.limits import CacheShape

_FAMILIES: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu, "reference": reference}
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
"""What `auto` tries on a device. Triton's interpreter is for tests: on a CPU it must be named."""
_RUNS_ON = {"triton": {"cuda"}, "cuda": {"cuda"}, "cpu": {"cpu"}, "reference": {"cpu", "cuda"}}


class Family:
    """A kernel family as `momentkv doctor` lists it."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name = name
        self.module = module

    def objections(self) -> list[str]:
        """Reasons why the family cannot run here; empty = it works."""
        return self.module.objections()


def describe(module: ModuleType) -> str:
    """Name of a family for a log line, with the instruction set where it has one."""
    name = next(name for name, known in _FAMILIES.items() if known is module)
    return f"{name} ({module.isa()})" if hasattr(module, "isa") else name


def families() -> list[Family]:
    """All families."""
    return [Family(name, module) for name, module in _FAMILIES.items()]


def preferred(device: str) -> list[Family]:
    """What `auto` tries on a device, best first."""
    return [Family(name, _FAMILIES[name]) for name in _PREFERRED[device]]


def select(name: str = "auto", device: str = "cpu", shape: CacheShape | None = None) -> ModuleType:
    """The module of the family `name`, for tensors on `device` and, if it is known, a cache of that shape.

    Raises ValueError if it is unknown or objects."""
    for candidate in _PREFERRED[device] if name == "auto" else (name,):
        if candidate not in _FAMILIES:
            break
        why = _objections(candidate, device) or (_FAMILIES[candidate].LIMITS.objections(shape) if shape else [])
        if not why:
            return _FAMILIES[candidate]
        if name != "auto":
            raise ValueError(
                f"kernel family {name!r} cannot run here: {'; '.join(why)}; use 'auto', or serve without --kv-eviction"
            )
    raise ValueError(f"no kernel family {name!r} works here; `momentkv doctor` says why")


def _objections(name: str, device: str) -> list[str]:
    """Why a family cannot run here on tensors of `device`."""
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device not in _RUNS_ON[name] and not interpreted:
        return [f"it does not run on {device!r} tensors"]
    return _FAMILIES[name].objections()
