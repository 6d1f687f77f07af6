"""The one configuration object of KV eviction: what the user may set, the legal ranges, and the defaults.

It travels as the plain dict `additional_config["kv_eviction"]` (vLLM's official carrier to every process) and is
rebuilt from it wherever it is needed, so that every process agrees by construction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

CONFIG_KEY = "kv_eviction"
"""Our key inside vLLM's `additional_config`."""

PREFILL_MODES = ("chunked", "full")
CORRECTIONS = ("off", "zeroth", "first")
STORE_DTYPES = ("auto", "model", "int8", "int4")
RUN_TOKENS = (1, 8, 16)
MOMENT_DTYPES = ("int8", "bfloat16", "float32")
KERNELS = ("auto", "cpu", "triton", "cuda", "reference")

# A policy may need its own protocol: each entry replaces defaults, never what the user has set.
POLICY_DEFAULTS: dict[str, dict[str, Any]] = {
    "momentkv": {},
    # arXiv 2606.01563, section "Protocol": evict after the prompt, one sink, the last 32 queries observed and kept.
    "paper": {
        "correction": "first", "prefill": "full", "sink_tokens": 1, "window_tokens": 32, "observation_tokens": 32
    },
    # The baselines as published: no correction unless the user asks for one; half of H2O's budget is recent tokens, SnapKV
    # keeps its observation window, the others one page.
    "streamingllm": {"correction": "off"},
    "random": {"correction": "off", "window_tokens": 16},
    "knorm": {"correction": "off", "window_tokens": 16},
    "keydiff": {"correction": "off", "window_tokens": 16},
    "h2o": {"correction": "off"},
    "tova": {"correction": "off", "window_tokens": 16, "observation_tokens": 1},
    "snapkv": {"correction": "off", "prefill": "full", "window_tokens": 32, "observation_tokens": 32},
    "expected_attention": {
        "correction": "off", "prefill": "full", "window_tokens": 16, "observation_tokens": 128
    },
}  # fmt: skip


@dataclass(frozen=True)
class EvictionConfig:
    """KV eviction settings; every count is in tokens of one sequence.

    Attributes:
        policy: which tokens stay ("off" is stock vLLM).
        budget_tokens: KV budget of a sequence, the moment state included; rounded down to whole pages.
        window_tokens: newest tokens that are always kept exact (rounded up to whole pages); 0 means half of the budget.
        sink_tokens: first tokens of a sequence that are never evicted.
        prefill: "chunked" evicts while the prompt is read (memory bounded by the budget plus one scheduler chunk);
            "full" attends the whole prompt exactly and evicts at its end (needs memory for the whole prompt).
        correction: order of the closed form added for the evicted attention mass ("off", "zeroth", "first").
        moment_dtype: storage type of the value-key covariance (int8 with a scale per key dimension); means are always float32,
            all arithmetic is float32.
        store_dtype: storage type of the tokens that eviction retains; the newest ones and all of a sequence below its budget
            have the model's. "int8" and "int4" hold more of them in the same memory: nothing is evicted until they are full.
            "auto" is "model".
        run_tokens: neighbours that are retained or evicted together.
        observation_tokens: queries before an eviction whose attention a policy may use (`momentkv`, `paper`, `snapkv`,
            `tova`, `expected_attention`).
        retire_tokens: tokens between two evictions, rounded up to whole pages; 0 means 1/32 of the budget (one page at least).
        kernels: kernel family ("auto" takes the fastest that works here; a named one never falls back).
    """

    policy: str = "off"
    budget_tokens: int = 1024
    window_tokens: int = 0
    sink_tokens: int = 4
    prefill: str = "chunked"
    correction: str = "zeroth"
    moment_dtype: str = "bfloat16"
    store_dtype: str = "auto"
    run_tokens: int = 1
    observation_tokens: int = 8
    retire_tokens: int = 0
    kernels: str = "auto"

    def __post_init__(self) -> None:
        _choice("policy", self.policy, ("off", *POLICY_DEFAULTS))
        _choice("prefill", self.prefill, PREFILL_MODES)
        _choice("correction", self.correction, CORRECTIONS)
        _choice("moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        _choice("store_dtype", self.store_dtype, STORE_DTYPES)
        _choice("run_tokens", self.run_tokens, RUN_TOKENS)
        _choice("kernels", self.kernels, KERNELS)
        _count("budget_tokens", self.budget_tokens, 1)
        _count("window_tokens", self.window_tokens, 0)
        _count("sink_tokens", self.sink_tokens, 0)
        _count("observation_tokens", self.observation_tokens, 1)
        _count("retire_tokens", self.retire_tokens, 0)

    @property
    def active(self) -> bool:
        return self.policy != "off"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "EvictionConfig":
        """Build from user keys; absent keys take the policy's defaults. Raises ValueError naming key, value, range.

        `{"policy": "momentkv", "budget_tokens": 1024}` is a complete configuration.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise ValueError(f"{CONFIG_KEY}={values!r} is not a JSON object; write e.g. {_EXAMPLE}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{CONFIG_KEY}: unknown key {unknown[0]!r}; legal keys are {', '.join(known)}")
        if "policy" not in values and values:
            raise ValueError(
                f"{CONFIG_KEY}: keys {sorted(values)} without 'policy'; set --kv-eviction, e.g. {_EXAMPLE}"
            )
        policy = values.get("policy", "off")
        defaults = POLICY_DEFAULTS.get(policy, {}) if isinstance(policy, str) else {}
        return cls(**{**defaults, **values})

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> "EvictionConfig":
        """The configuration carried by a `VllmConfig` (vllm/config/vllm.py, field `additional_config`)."""
        carrier = vllm_config.additional_config
        return cls.from_dict(carrier.get(CONFIG_KEY) if isinstance(carrier, Mapping) else None)


_EXAMPLE = '{"policy": "momentkv", "budget_tokens": 1024}'


def _choice(key: str, value: Any, legal: tuple[str, ...] | tuple[int, ...]) -> None:
    # bool is an int in Python, as in _count.
    if value not in legal or isinstance(value, bool):
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not one of {', '.join(map(str, legal))}")


def _count(key: str, value: Any, least: int) -> None:
    # bool is an int in Python: `true` in JSON must not become the budget 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{CONFIG_KEY}.{key}={value!r} is not a whole number of tokens >= {least}")
