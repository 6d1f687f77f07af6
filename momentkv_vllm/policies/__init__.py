"""Eviction policies, by the name that `--kv-eviction` takes.

Every file of this folder with a policy in it is one; other packages add theirs by the entry-point group
`momentkv_vllm.policies`, name = "package.module:Class" (docs/policies.md). Names are read from the installed metadata, which is
the same in every process; code of another package is imported when its policy is asked for, so a broken one harms nobody else.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from momentkv_vllm import __version__
from momentkv_vllm.policies.base import Candidates, Observation, Policy, objections
from momentkv_vllm.refuse import WITHOUT, refuse

GROUP = "momentkv_vllm.policies"
DEFAULT = "momentkv"
OFF = "off"
"""No policy: stock vLLM."""
WAYS_OUT = ("choose another policy", WITHOUT)

__all__ = ["DEFAULT", "GROUP", "OFF", "Candidates", "Observation", "Policy", "builtins", "find", "names", "origin"]


@dataclass(frozen=True)
class _Claim:
    """A name, the installed package that gives it to a policy, and how to get the class."""

    name: str
    origin: str
    load: Callable[[], type[Policy]]


def names() -> list[str]:
    """Every name that a policy has: the default one, the others built in, those of other packages."""
    return list(_claims())


def builtins() -> dict[str, type[Policy]]:
    """This package's own policies by name, the default one first. Raises ValueError if two files take one name."""
    modules = (f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__))
    found: dict[str, type[Policy]] = {}
    for policy in (c for module in modules for c in _policies_of(module)):
        if found.setdefault(policy.name, policy) is not policy:
            raise ValueError(
                f"policy {policy.name!r} is both {found[policy.name].__module__} and {policy.__module__}; rename one"
            )
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT, item[0])))


@functools.cache
def find(name: str) -> type[Policy]:
    """The policy of that name. Raises ValueError if there is none, if several packages claim it, or if it cannot be used."""
    claims = _claims().get(name, [])
    if not claims:
        raise ValueError(f"policy {name!r} is not one of {', '.join([OFF, *names()])}")
    if len(claims) > 1:
        claimed = f"policy {name!r} is claimed by {' and by '.join(c.origin for c in claims)}"
        refuse(claimed, f"uninstall one, or {WAYS_OUT[0]}", WITHOUT)
    (claim,) = claims
    try:
        policy = claim.load()
    except Exception as error:  # whatever a stranger's module raises is the reason why its policy cannot be used
        why = [f"{type(error).__name__}: {error}"]
    else:
        why = objections(policy)
        if not why and policy.name != name:
            why = [f"its class calls itself {policy.name!r}"]
    if why:
        refuse(f"policy {name!r} of {claim.origin} cannot be used: {'; '.join(why)}", "repair that package", *WAYS_OUT)
    return policy


def origin(name: str) -> str:
    """Where the policies of that name come from: distribution and version."""
    return ", ".join(c.origin for c in _claims()[name])


@functools.cache
def _claims() -> dict[str, list[_Claim]]:
    ours = f"momentkv-vllm {__version__}"
    found = {name: [_Claim(name, ours, lambda policy=policy: policy)] for name, policy in builtins().items()}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        theirs = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        found.setdefault(point.name, []).append(_Claim(point.name, theirs, point.load))
    found.pop(OFF, None)
    return found


def _policies_of(module: str) -> list[type[Policy]]:
    """Policies that are written in `module`, not those that it imports."""
    classes = [c for c in vars(importlib.import_module(module)).values() if isinstance(c, type)]
    return [c for c in classes if c.__module__ == module and issubclass(c, Policy) and c is not Policy]
