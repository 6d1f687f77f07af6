"""Registers our classes at vLLM's public registries."""


def register_seams() -> None:
    """Idempotent; without --kv-eviction the registered classes behave as the ones they replace."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from momentkv_vllm.block_manager.manager import MomentKVManager
    from momentkv_vllm.kv_spec import MomentKVSpec
    from momentkv_vllm.vllm_seams.block_memory import patch_block_memory
    from momentkv_vllm.vllm_seams.cpu_runner import patch_cpu_runner
    from momentkv_vllm.vllm_seams.drafts import patch_drafters
    from momentkv_vllm.vllm_seams.engine_core import patch_engine_core
    from momentkv_vllm.vllm_seams.gpu import patch_gpu_worker
    from momentkv_vllm.vllm_seams.requests import patch_input_processor
    from momentkv_vllm.vllm_seams.row_classes import patch_row_classes
    from momentkv_vllm.vllm_seams.worker import measures, patch_worker

    # The CPU platform always asks for CPU_ATTN (vllm/platforms/cpu.py), so ours takes its place.
    register_backend(AttentionBackendEnum.CPU_ATTN, "momentkv_vllm.attention.cpu_backend.MomentKVBackend")
    # On CUDA a backend is chosen by name: vllm_seams/gpu.py does, with --kv-eviction.
    register_backend(AttentionBackendEnum.CUSTOM, "momentkv_vllm.attention.cuda_choice.CudaChoice")
    # Registering first would make vLLM believe that its own specs are registered already.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(MomentKVSpec, MomentKVManager, uniform_type_base_spec=FullAttentionSpec)
    patch_engine_core()
    patch_input_processor()
    if measures(current_platform.device_type):
        patch_worker()
    if current_platform.is_cpu():
        patch_cpu_runner()
        patch_row_classes()
        patch_block_memory()
        patch_drafters()
    elif current_platform.is_cuda():
        patch_gpu_worker()
