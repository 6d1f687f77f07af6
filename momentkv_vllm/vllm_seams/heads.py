"""Whether the heads of a model may have budgets of their own (head_budgets.py)."""

import logging

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.refuse import Unsupported, refuse_first

logger = logging.getLogger(f"vllm.{__name__}")


def settled_head_budgets(config: EvictionConfig, layout: StateLayout, kernels: str) -> str:
    """ "measured" or "equal". Raises ValueError if "measured" is asked for and cannot be.

    Args:
        kernels: name of the family that serves.
    """
    if config.head_budgets == "equal":
        return "equal"
    rows = _rows(config, layout, kernels)
    if config.head_budgets == "measured":
        refuse_first(
            [row._replace(way_out="use 'auto' or 'equal'") for row in rows], "kv_eviction.head_budgets='measured'"
        )
        return "measured"
    against = next((row.feature for row in rows if row.present), None)
    found = "equal" if against else "measured"
    logger.info(
        "momentkv: head_budgets auto is %s%s", found, f"; measured does not support {against}" if against else ""
    )
    return found


def _rows(config: EvictionConfig, layout: StateLayout, kernels: str) -> list[Unsupported]:
    return [
        Unsupported(f"store_dtype {config.store_dtype!r} (only int8, int4)", layout.packed is None),
        Unsupported(f"policy {config.policy!r}, whose score no kernel has", config.policy_class.native is None),
        Unsupported(f"kernels {kernels!r} (only 'cpu')", kernels != "cpu"),
        Unsupported(f"run_tokens {config.run_tokens} (only 8, 16)", config.run_tokens == 1),
    ]
