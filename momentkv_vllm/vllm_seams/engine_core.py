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


def kv_eviction_states(self: Any, action: str, name: str, tokens: list, salt: str) -> dict[str, Any]:
    """Save or load a state (block_manager/state_transfer.py); {"error": text} for what the caller can mend. `salt` "": none.

    Of data-parallel engines only the first one saves: all would write the same file."""
    from momentkv_vllm.block_manager.state_transfer import StateTransfer, states_of

    if action not in ACTIONS or (action == "save" and self.vllm_config.parallel_config.data_parallel_index):
        return {}
    if states_of(self.scheduler) is None:
        way_out = "set --kv-eviction-config.state_folder, and a state_share of the pool that one state fits in"
        return {"error": f"this server keeps no states in files; {way_out}"}
    try:
        if not hasattr(self, "kv_state_transfer"):  # made once: it reads parts of the weight files
            made = StateTransfer(self.vllm_config, self.scheduler, self.collective_rpc, self.request_block_hasher)
            self.kv_state_transfer = made
        transfer, salt = self.kv_state_transfer, salt or None
        return transfer.save(name, tokens, salt) if action == "save" else transfer.load(name, salt)
    except ValueError as error:
        return {"error": str(error)}
