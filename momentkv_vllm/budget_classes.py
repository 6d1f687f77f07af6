"""Budgets that a request chooses from: declared at start-up, the first is the default.

A request names one in `vllm_xargs: {"kv_budget": ...}` of the OpenAI API, in Python `SamplingParams.extra_args`. These travel to
the scheduler and with a new request to every worker, so both know its class without a message of ours. What the API server lets
in (vllm_seams/requests.py) is a name that there is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from momentkv_vllm.refuse import refuse

KV_BUDGET, KV_USAGE = "kv_budget", "kv_eviction_usage"
"""Keys of a request's extra arguments: the class it chooses, and whether its response says what it held."""
USAGE_FIELD = "kv_eviction"
"""In a response's usage block, and in vLLM's `RequestOutput.kv_transfer_params`: what was held and evicted."""
KEEPS_ALL = "off"
"""As a class's budget: its requests keep every token."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
SALT = "kv_budget="
_WRITE = "write e.g. 1024,4096,off or small=1024,large=4096,exact=off"

Budgets = tuple[tuple[str, int | None], ...]
"""Name and tokens of each class, the default first; None keeps all."""


def budgets_of(value: Any) -> Budgets:
    """Classes of "1024,4096,off", "small=1024,exact=off", a list or a map of the same. Raises ValueError on anything else, on
    a name twice, and where no class evicts."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, Mapping):
        pairs = list(parts.items())
    elif isinstance(parts, Sequence):
        pairs = [_pair(part) for part in parts]
    else:
        refuse(f"the budgets {value!r} are no list and no map", _WRITE)
    found = tuple((str(name), _tokens(tokens, value)) for name, tokens in pairs)
    names = [name for name, _ in found]
    if wrong := [name for name in names if not NAME.fullmatch(name)]:
        refuse(
            f"{wrong[0]!r} in the budgets {value!r} is no name of a class", "use up to 32 letters, digits, _ . and -"
        )
    if len(set(names)) < len(names):
        refuse(f"the budgets {value!r} name a class twice", "give each its own name")
    if all(tokens is None for _, tokens in found):
        refuse(f"the budgets {value!r} evict nothing", "name one in tokens")
    return found


def written(budgets: Budgets) -> dict[str, int | str]:
    """As a map that `budgets_of` reads."""
    return {name: KEEPS_ALL if tokens is None else tokens for name, tokens in budgets}


def class_number(names: Sequence[str], extra_args: Mapping[str, Any] | None) -> int:
    """Place among the classes of the one that a request's extra arguments name; without one the default, 0. Raises ValueError
    with the legal names."""
    if not extra_args or KV_BUDGET not in extra_args:
        return 0
    name = str(extra_args[KV_BUDGET])
    if name not in names:
        refuse(f"kv_budget={name!r} is not one of {', '.join(names)}", f"leave it out for {names[0]}")
    return names.index(name)


def salted(salt: str | None, names: Sequence[str], number: int) -> str | None:
    """What the hashes of a request's blocks start from. Beyond the smaller budget the same tokens have other keys and values in
    another class, in every layer: those of the default class keep vLLM's hashes, the others have their own. So has a salt of a
    client that looks like ours."""
    salt_of_class = number or (salt or "").startswith(SALT)
    return f"{SALT}{names[number]} {salt or ''}" if salt_of_class else salt


def _pair(part: Any) -> tuple[Any, Any]:
    if isinstance(part, tuple):
        return part
    name, equals, tokens = str(part).strip().partition("=")
    return (name, tokens) if equals else (name, name)


def _tokens(value: Any, budgets: Any) -> int | None:
    if value in (None, KEEPS_ALL):
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if type(value) is not int or value < 1:
        refuse(f"{value!r} in the budgets {budgets!r} is neither a number of tokens from 1 nor {KEEPS_ALL!r}", _WRITE)
    return value
