"""The one configuration object of KV eviction: what the user may set, the legal ranges, and the defaults.

It travels as the plain dict `additional_config["kv_eviction"]` (vLLM's official carrier to every process) and is
rebuilt from it wherever it is needed, so that every process agrees by construction.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from momentkv_vllm.budget_classes import Budgets, budgets_of, written
from momentkv_vllm.policies import OFF, WAYS_OUT, Policy, find, names, origin
from momentkv_vllm.refuse import refuse

CONFIG_KEY = "kv_eviction"
"""Our key inside vLLM's `additional_config`."""

PREFILL_MODES = ("auto", "chunked", "full")
CORRECTIONS = ("off", "zeroth", "first")
STORE_DTYPES = ("auto", "model", "int8", "int4")
RUN_TOKENS = (1, 8, 16)
HEAD_BUDGETS = ("auto", "equal", "measured")
KEY_ROUNDINGS = ("auto", "nearest", "measured")
MOMENT_DTYPES = ("int8", "bfloat16", "float32")
AUTO = "auto"
"""As a number of tokens: None, the value that follows from the budget."""
KERNELS = (AUTO, "cpu", "triton", "cuda", "reference")
SMALL_BUDGET_TOKENS = 1024
"""Budgets up to this get pages of 16 tokens instead of 32: a page is the grain of store, moments and window."""

logger = logging.getLogger(f"vllm.{__name__}")


class BudgetClass(NamedTuple):
    """What some requests are served with.

    config: as if it were the only class. evicts: False where its requests keep every token; `config` has a budget all the same.
    """

    name: str
    config: "EvictionConfig"
    evicts: bool


@dataclass(frozen=True)
class EvictionConfig:
    """KV eviction settings; every count is in tokens of one sequence.

    Attributes:
        policy: which tokens stay ("off" is stock vLLM). A policy's own defaults go before those below.
        budget_tokens: KV budget of a sequence, the moment state included; rounded down to whole pages. With `budgets` the first
            of these that is a number.
        budgets: classes that a request chooses from, by name in tokens or "off", the first is the default; None: one class of
            `budget_tokens`.
        window_tokens: newest tokens that are always kept exact, rounded up to whole pages; None ("auto"): 1/16 of the budget
            with a quantised store, else half.
        sink_tokens: first tokens of a sequence that are never evicted; a quantised store keeps its first run in any case.
        prefill: "chunked" evicts while the prompt is read (memory bounded by the budget plus one scheduler chunk);
            "full" attends the whole prompt exactly and evicts at its end (needs memory for the whole prompt);
            "auto" is full for prompts of at most `exact_prompt_tokens` and chunked for longer ones.
        exact_prompt_tokens: read by prefill "auto" only; None ("auto"): 4 times the budget.
        correction: order of the closed form added for the evicted attention mass ("off", "zeroth", "first").
        moment_dtype: storage type of the value-key covariance (int8 with a scale per key dimension); means are always float32,
            all arithmetic is float32.
        store_dtype: storage type of the tokens that eviction retains; the newest ones and all of a sequence below its budget
            have the model's. "int8" and "int4" hold more of them in the same memory: nothing is evicted until they are full.
            "auto" is "int4" for models of 16 bits and "int8" for those of 32, where the kernels have it and a page then holds
            more tokens, else "model".
        run_tokens: neighbours that are retained or evicted together; None ("auto"): 8 with a quantised store, else 1.
        head_budgets: how heads share a quantised store. "equal": all hold as many tokens; "measured": those that look far hold
            more, over all layers, and every one a sixth of an equal share at least (head_budgets.py); "auto" is "measured" where
            that can be (docs/design.md).
        key_rounding: how keys of a quantised store are rounded. "nearest": every number by itself; "measured": so that errors lie
            where the model's queries do not look (key_rounding.py); "auto" is "measured" where that can be.
        observation_tokens: queries before an eviction whose attention a policy may use that observes the last ones.
        retire_tokens: tokens between two evictions, rounded up to whole pages; None ("auto"): 1/32 of the budget, one page at
            least.
        prefill_retire_tokens: likewise while a prompt is read in chunks, rounded up to a multiple of `retire_tokens`; a sequence
            holds up to so many tokens more meanwhile; None ("auto"): `retire_tokens`.
        state_share: share of the KV pool that stores and moments of evicted prefixes may fill in the prefix cache, 0 to 1 (then
            vLLM's order of last use alone decides); 0: none are kept.
        state_interval_tokens: a prompt keeps its state every so many tokens while it is read; 0: only where it is likely to be
            used (block_manager/states.py).
        state_folder: absolute path of the folder that states may be saved to and loaded from (docs/prefix-caching.md); without it
            they are not kept in files.
        kernels: kernel family ("auto" takes the fastest that works here; a named one never falls back).
    """

    policy: str = OFF
    budget_tokens: int = 1024
    budgets: Budgets | None = None
    window_tokens: int | None = None
    sink_tokens: int = 4
    prefill: str = "chunked"
    exact_prompt_tokens: int | None = None
    correction: str = "zeroth"
    moment_dtype: str = "bfloat16"
    store_dtype: str = "auto"
    run_tokens: int | None = None
    head_budgets: str = AUTO
    key_rounding: str = AUTO
    observation_tokens: int = 16
    retire_tokens: int | None = None
    prefill_retire_tokens: int | None = None
    state_share: float = 1.0
    state_interval_tokens: int = 0
    state_folder: str | None = None
    kernels: str = AUTO

    def __post_init__(self) -> None:
        _choice("policy", self.policy, (OFF, *names()))
        if self.active:
            find(self.policy)
        _choice("prefill", self.prefill, PREFILL_MODES)
        _choice("correction", self.correction, CORRECTIONS)
        _choice("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        _choice("store_dtype", self.store_dtype, STORE_DTYPES)
        _choice("head_budgets", self.head_budgets, HEAD_BUDGETS)
        _choice("key_rounding", self.key_rounding, KEY_ROUNDINGS)
        _choice("kernels", self.kernels, KERNELS)
        if self.budgets is not None:
            object.__setattr__(self, "budgets", budgets_of(self.budgets))
            object.__setattr__(self, "budget_tokens", _first_number(self.budgets))
        _count("budget_tokens", self.budget_tokens, 1)
        _count("sink_tokens", self.sink_tokens, 0)
        _count("observation_tokens", self.observation_tokens, 1)
        _count("state_interval_tokens", self.state_interval_tokens, 0)
        _share("state_share", self.state_share)
        _folder("state_folder", self.state_folder)
        # The dataclass is frozen.
        for key in ("window_tokens", "retire_tokens", "prefill_retire_tokens", "exact_prompt_tokens"):
            object.__setattr__(self, key, _count_or_auto(key, getattr(self, key)))
        if self.run_tokens in (AUTO, None):
            object.__setattr__(self, "run_tokens", None)
        else:
            _choice("run_tokens", self.run_tokens, RUN_TOKENS)

    @property
    def active(self) -> bool:
        return self.policy != OFF

    @property
    def default_page_tokens(self) -> int:
        """Tokens of a page where the user chooses none: the grain of store, moments and window."""
        return 16 if min(c.config.budget_tokens for c in self.classes) <= SMALL_BUDGET_TOKENS else 32

    @cached_property
    def classes(self) -> tuple[BudgetClass, ...]:
        """What requests choose from, the default first."""
        budgets = self.budgets or ((str(self.budget_tokens), self.budget_tokens),)
        return tuple(
            BudgetClass(
                name, replace(self, budgets=None, budget_tokens=tokens or self.budget_tokens), tokens is not None
            )
            for name, tokens in budgets
        )

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    @property
    def policy_class(self) -> type[Policy]:
        """The policy that is on. Raises ValueError if none is."""
        return find(self.policy)

    @property
    def quantised_store(self) -> str:
        """ "int8", "int4", or "" where the store is of the model's dtype or not settled yet (kv_spec.py, `settled`)."""
        return self.store_dtype if self.store_dtype in ("int8", "int4") else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"budgets": self.budgets and written(self.budgets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "EvictionConfig":
        """Build from user keys; absent keys take the policy's defaults. Raises ValueError naming key, value, range.

        `{"policy": "momentkv", "budget_tokens": 1024}` is a complete configuration.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            refuse(f"{CONFIG_KEY}={values!r} is not a JSON object", f"write e.g. {_EXAMPLE}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            refuse(f"{CONFIG_KEY}: unknown key {unknown[0]!r}", f"legal keys are {', '.join(known)}")
        if "policy" not in values and values:
            refuse(f"{CONFIG_KEY}: keys {sorted(values)} without 'policy'", f"set --kv-eviction, e.g. {_EXAMPLE}")
        if values.get("budgets") is not None and "budget_tokens" in values:
            first = _first_number(budgets_of(values["budgets"]))
            if values["budget_tokens"] != first:
                refuse(
                    f"{CONFIG_KEY}.budget_tokens={values['budget_tokens']!r} contradicts budgets, whose first number is {first}",
                    "give one",
                )
        policy = values.get("policy", "off")
        defaults = find(policy).defaults if policy in names() else {}
        if not set(defaults) <= set(known):
            refuse(
                f"policy {policy!r} of {origin(policy)} has defaults for {sorted(set(defaults) - set(known))}; legal keys are "
                f"{', '.join(known)}",
                *WAYS_OUT,
            )
        return cls(**{**defaults, **values})

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> "EvictionConfig":
        """The configuration carried by a `VllmConfig` (vllm/config/vllm.py, field `additional_config`)."""
        carrier = vllm_config.additional_config
        return cls.from_dict(carrier.get(CONFIG_KEY) if isinstance(carrier, Mapping) else None)


def _first_number(budgets: Budgets) -> int:
    return next(tokens for _, tokens in budgets if tokens is not None)


_EXAMPLE = '{"policy": "momentkv", "budget_tokens": 1024}'


def _choice(key: str, value: Any, legal: tuple[str, ...] | tuple[int, ...]) -> None:
    # In Python 8.0 and True are numbers too.
    if not any(type(value) is type(x) and value == x for x in legal):
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not one of {', '.join(map(str, legal))}")


def _count(key: str, value: Any, least: int, others: str = "") -> None:
    # bool is an int in Python: `true` in JSON must not become the budget 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not a whole number of tokens >= {least}{others}")


def _share(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not a number from 0 to 1")


def _folder(key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and os.path.isabs(value)):
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not the absolute path of a folder")


def _count_or_auto(key: str, value: Any) -> int | None:
    """Tokens, or None for what `auto`, null, and for one release 0 mean."""
    if type(value) is int and value == 0:
        logger.warning(
            "momentkv: %s.%s=0 is read as auto; write null or leave it out, 0 will be refused", CONFIG_KEY, key
        )
        return None
    if value is None or value == AUTO:
        return None
    _count(key, value, 1, f", or {AUTO!r}")
    return value
