"""Whether the heads of a model may have budgets of their own (head_budgets.py)."""

from typing import TYPE_CHECKING

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.kv_spec import StateLayout, expected_schedules
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.refuse import Unsupported, refuse_first

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def settled_head_budgets(vllm_config: "VllmConfig", config: EvictionConfig, layout: StateLayout, kernels: str) -> str:
    """ "measured" or "equal". Raises ValueError if "measured" is asked for and cannot be.

    Args:
        kernels: name of the family that serves.
    """
    rows = [] if config.head_budgets == "equal" else _rows(vllm_config, config, layout, kernels)
    if config.head_budgets == "measured":
        refuse_first(
            [row._replace(way_out="use 'auto' or 'equal'") for row in rows], "kv_eviction.head_budgets='measured'"
        )
    if config.head_budgets != AUTO:
        return config.head_budgets
    return "equal" if any(row.present for row in rows) else "measured"


def _rows(vllm_config: "VllmConfig", config: EvictionConfig, layout: StateLayout, kernels: str) -> list[Unsupported]:
    schedules = expected_schedules(config, vllm_config)
    return [
        Unsupported(f"store_dtype {config.store_dtype!r} (only int8, int4)", layout.packed is None),
        Unsupported(f"policy {config.policy!r}, whose score no kernel has", config.policy_class.native is None),
        Unsupported(f"kernels {kernels!r} (only 'cpu')", kernels != "cpu"),
        Unsupported(f"run_tokens {config.run_tokens} (only 8, 16)", config.run_tokens == 1),
        # Events that retire what other heads' tokens still lie in: own tiles are not enough (head_budgets.py, tiles_of).
        Unsupported(f"prefill {config.prefill!r}", config.prefill != "chunked"),
        Unsupported("prefill_retire_tokens", config.prefill_retire_tokens),
        *(_small_store(s) for s in schedules if s.evicts),
    ]


def _small_store(schedule: PageSchedule) -> Unsupported:
    first = (schedule.store_pages + schedule.retire_pages) * schedule.page_size
    return Unsupported(
        f"a budget of {schedule.budget_pages * schedule.page_size} tokens with a first event of {first} and a store of "
        f"{schedule.store_tokens}",
        first > schedule.store_tokens,
    )
