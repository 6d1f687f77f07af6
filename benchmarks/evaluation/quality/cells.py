"""What is compared: methods, budgets, prefill modes, and the two meanings of "the same budget"."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from momentkv_vllm.config import SMALL_BUDGET_TOKENS, EvictionConfig
from momentkv_vllm.fp8 import PAGE_TOKENS
from momentkv_vllm.kv_spec import StateLayout, record_layout, settled
from momentkv_vllm.policies import DEFAULT, names

FULL = "full cache"
FP8 = "fp8 KV"
OURS = DEFAULT
OFF = "momentkv, off"
FIRST = "momentkv, first"
BASELINES = tuple(name for name in names() if name != OURS)
"""Those of other packages too, where some are installed."""
METHODS: dict[str, dict[str, Any]] = {
    OURS: {"policy": "momentkv"},
    FIRST: {"policy": "momentkv", "correction": "first", "moment_dtype": "int8"},
    OFF: {"policy": "momentkv", "correction": "off"},
    **{name: {"policy": name} for name in BASELINES},
}
"""Those that evict; FP8 keeps every token in half the bytes."""
ABLATION: dict[str, dict[str, Any]] = {
    "snapkv, zeroth": {"policy": "snapkv", "correction": "zeroth"},
    "snapkv, first": {"policy": "snapkv", "correction": "first"},
    "paper, off": {"policy": "paper", "correction": "off"},
    "paper, zeroth": {"policy": "paper", "correction": "zeroth"},
}
"""Beside snapkv (none of the two) and paper (both): the paper's ablation of its score (MI) and its correction (NC)."""
IN_OUR_STORE: dict[str, Any] = {"store_dtype": "int4", "run_tokens": 8, "window_tokens": None}
STORES: dict[str, dict[str, Any]] = {
    "momentkv, int8": {"policy": "momentkv", "store_dtype": "int8"},
    "momentkv, 16 bit": {"policy": "momentkv", "store_dtype": "model"},
    **{f"{name}, int4": {"policy": name, **IN_OUR_STORE} for name in BASELINES},
    **{f"{name}, int4": {**ablated, **IN_OUR_STORE} for name, ablated in ABLATION.items()},
}
"""Other stores: ours in others, and the others' scores, corrections and prompts in ours."""
HEADS: dict[str, dict[str, Any]] = {
    f"momentkv, {how} heads": {"policy": "momentkv", "head_budgets": how} for how in ("equal", "measured")
}
"""Ours, by what its heads hold."""
GRAINS: dict[str, dict[str, Any]] = {
    f"momentkv, prompts every {tokens}": {"policy": "momentkv", "prefill_retire_tokens": tokens}
    for tokens in (64, 128, 256, 512)
}
"""Ours, with events further apart while a prompt is read."""
OVER_FP8 = f"momentkv, {FP8}"
"""Ours over a cache of fp8: twice the tokens in the same bytes."""
NEAREST: dict[str, dict[str, Any]] = {"momentkv, nearest rounding": {"policy": "momentkv", "key_rounding": "nearest"}}
"""Ours, whose keys are rounded without a look at queries."""
KNOWN = METHODS | ABLATION | STORES | HEADS | NEAREST | GRAINS | {OVER_FP8: {"policy": "momentkv"}}

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Attributes:
        prefill: "chunked" or "full"; "" when nothing is evicted.
        budget_tokens: KV tokens of the model's dtype that the method may hold; 0: no limit.
        column: "bytes", the state is part of the budget; "tokens", the state comes on top.
        state_tokens: what comes on top.
    """

    method: str
    prefill: str = ""
    budget_tokens: int = 0
    column: str = "bytes"
    state_tokens: int = 0

    @property
    def name(self) -> str:
        parts = (self.method, self.prefill, self.budget_tokens, f"equal {self.column}" if self.prefill else "")
        return " / ".join(str(p) for p in parts if p)

    @property
    def page_size(self) -> int:
        """The product's choice for this budget, the same in both columns."""
        return 16 if self.budget_tokens <= SMALL_BUDGET_TOKENS and self.numbers is DTYPE else PAGE_TOKENS

    @property
    def numbers(self) -> torch.dtype:
        """Of the KV cache."""
        return torch.float8_e4m3fn if self.method in (FP8, OVER_FP8) else DTYPE

    @property
    def eviction(self) -> dict[str, Any]:
        """As `additional_config["kv_eviction"]`; `retire_tokens` is said because its default follows the budget."""
        fewer_bytes = DTYPE.itemsize // self.numbers.itemsize
        return {
            **KNOWN[self.method],
            "prefill": self.prefill,
            "budget_tokens": (self.budget_tokens + self.state_tokens) * fewer_bytes,
            "retire_tokens": self.budget_tokens * fewer_bytes // 32,
        }

    def engine_options(self, context: int) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for prompts and answers of `context` tokens."""
        options: dict[str, Any] = {
            "dtype": str(DTYPE).removeprefix("torch."), "max_model_len": context, "enforce_eager": True,
            "enable_prefix_caching": False,
        }  # fmt: skip
        if self.numbers is not DTYPE:
            options["kv_cache_dtype"] = "fp8"
        if self.prefill:
            options |= {"block_size": self.page_size, "additional_config": {"kv_eviction": self.eviction}}
        return options


def cells(
    methods: Sequence[str], budgets: Sequence[int], prefills: Sequence[str], context: int, head_dim: int
) -> Iterator[Cell]:
    """The full cache first; then every method at equal bytes, and those with a state at equal tokens too.

    A budget that a method's state and window do not fit is left out, with a line that says so.
    """
    yield Cell(FULL)
    if FP8 in methods and context // 2 in budgets:
        yield Cell(FP8, budget_tokens=context // 2)
    for budget in budgets:
        for prefill in prefills:
            for method in [m for m in methods if m in KNOWN]:
                cell = Cell(method, prefill, budget)
                config = settled(EvictionConfig.from_dict(cell.eviction), cell.page_size, head_dim, cell.numbers)
                # In a quantised store the record lies behind the tokens, so it is part of the budget in any case.
                record = record_layout(config, head_dim)
                pages = 0 if config.quantised_store else record.pages(cell.page_size, cell.numbers.itemsize)
                state = pages * cell.page_size
                both = [cell, Cell(method, prefill, budget, "tokens", state)] if state else [cell]
                yield from (c for c in both if _fits(c, head_dim))


def _fits(cell: Cell, head_dim: int) -> bool:
    try:
        StateLayout.of(EvictionConfig.from_dict(cell.eviction), cell.page_size, head_dim, cell.numbers)
    except ValueError as error:
        print(f"left out: {cell.name}: {error}")
        return False
    return True
