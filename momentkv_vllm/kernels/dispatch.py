"""Kernel families behind one interface: `store`, `attend`, `observe`, `consolidate` (see reference.py, the specification).

A family declares what it cannot do; `select("auto")` takes the first without objections, an explicitly named family never
falls back.
"""

from types import ModuleType

from momentkv_vllm.kernels import cpu, cuda, reference

_FAMILIES: dict[str, ModuleType] = {"cpu": cpu, "reference": reference, "cuda": cuda}


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
    """All families, preferred first."""
    return [Family(name, module) for name, module in _FAMILIES.items()]


def select(name: str = "auto") -> ModuleType:
    """The module of the family `name`. Raises ValueError if it is unknown or objects."""
    for family in families():
        if name in ("auto", family.name):
            why = family.objections()
            if not why:
                return family.module
            if name != "auto":
                raise ValueError(f"kernel family {name!r} cannot run here: {'; '.join(why)}; use 'auto'")
    raise ValueError(f"no kernel family {name!r} works here; `momentkv doctor` says why")
