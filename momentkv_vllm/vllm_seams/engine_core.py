"""One more utility of vLLM's engine core, for states in files (ledger: vllm_seams/__init__.py).

vLLM's API server calls an engine core's methods by name. Ours is added, none is replaced: only there, block manager and workers
are both in reach, and no step runs meanwhile.
"""

from typing import Any

ACTIONS = ("save", "load")


def patch_engine_core() -> None:
    """Add the method; calling it again does nothing."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.kv_eviction_states = kv_eviction_states


def kv_eviction_states(
    self: Any, action: str, name: str, tokens: list, salt: str, kv_budget: str = ""
) -> dict[str, Any]:
    """Save or load a state (block_manager/state_transfer.py); {"error": text} for what can be mended. `salt` "": none.

    kv_budget: of the class, "": the default. Of data-parallel engines only the first one saves: all would write
    the same file."""
    from momentkv_vllm.block_manager.state_transfer import class_with_states

    if action not in ACTIONS or (action == "save" and self.vllm_config.parallel_config.data_parallel_index):
        return {}
    try:
        number = class_with_states(self.scheduler, kv_budget)
        if number is None:
            way_out = "set --kv-eviction-config.state_folder, and a state_share of the pool that one state fits in"
            return {"error": f"this server keeps no states in files; {way_out}"}
        transfer, salt = _transfer(self, number), salt or None
        return transfer.save(name, tokens, salt) if action == "save" else transfer.load(name, salt)
    except ValueError as error:
        return {"error": str(error)}


def _transfer(core: Any, number: int) -> Any:
    """That of a budget class, made once: it reads parts of the weight files."""
    from momentkv_vllm.block_manager.state_transfer import StateTransfer

    made = core.__dict__.setdefault("kv_state_transfers", {})
    if number not in made:
        made[number] = StateTransfer(
            core.vllm_config, core.scheduler, core.collective_rpc, core.request_block_hasher, number
        )
    return made[number]
