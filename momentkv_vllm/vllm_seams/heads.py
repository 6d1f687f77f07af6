"""Whether what the heads of a model do may be measured, to give them budgets of their own (head_budgets.py) and to round their
keys by it (key_rounding.py)."""

import logging

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.kernels import FAMILIES, KernelFamily
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.refuse import Unsupported, refuse_first
from momentkv_vllm.vllm_seams.worker import measures

logger = logging.getLogger(f"vllm.{__name__}")


def settled_head_budgets(config: EvictionConfig, layout: StateLayout, kernels: KernelFamily, device: str) -> str:
    """ "measured" or "equal". Raises ValueError if "measured" is asked for and cannot be.

    Args:
        kernels: the family that serves tensors on `device`.
    """
    able = ", ".join(repr(family.name) for family in FAMILIES if family.own_budgets)
    rows = [
        _exact_store(config, layout),
        Unsupported(f"policy {config.policy!r}, whose score no kernel has", config.policy_class.native is None),
        Unsupported(f"kernels {kernels.name!r} (only {able})", not kernels.own_budgets),
        _unmeasured(device),
        Unsupported(f"run_tokens {config.run_tokens} (only 8, 16)", config.run_tokens == 1),
    ]
    return _settled("head_budgets", config.head_budgets, "equal", rows)


def settled_key_rounding(config: EvictionConfig, layout: StateLayout, kernels: KernelFamily, device: str) -> str:
    """ "measured" or "nearest", likewise."""
    able = ", ".join(repr(family.name) for family in FAMILIES if family.feeds_back)
    rows = [
        _exact_store(config, layout),
        Unsupported(f"kernels {kernels.name!r} (only {able})", not kernels.feeds_back),
        _unmeasured(device),
    ]
    return _settled("key_rounding", config.key_rounding, "nearest", rows)


def _exact_store(config: EvictionConfig, layout: StateLayout) -> Unsupported:
    return Unsupported(f"store_dtype {config.store_dtype!r} (only int8, int4)", layout.packed is None)


def _unmeasured(device: str) -> Unsupported:
    return Unsupported(f"the device {device!r}, on which nothing measures heads", not measures(device))


def _settled(setting: str, value: str, otherwise: str, rows: list[Unsupported]) -> str:
    if value == "measured":
        way_out = f"use 'auto' or {otherwise!r}"
        refuse_first([row._replace(way_out=way_out) for row in rows], f"kv_eviction.{setting}='measured'")
    if value != AUTO:
        return value
    against = next((row.feature for row in rows if row.present), None)
    found = otherwise if against else "measured"
    reason = f"; measured does not support {against}" if against else ""
    logger.info("momentkv: %s auto is %s%s", setting, found, reason)
    return found
