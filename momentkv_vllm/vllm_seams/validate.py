"""Refuses, before anything is loaded, what eviction cannot serve: the server must never run silently without it."""

import os
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.model_layers import full_layers, has_windows
from momentkv_vllm.versions import ALLOW_UNTESTED_VARIABLE, TESTED_VLLM, installed_vllm
from momentkv_vllm.vllm_seams.gpu import BACKEND_NAMES, gpu_objections

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WAY_OUT = "change it, or serve without --kv-eviction"

WINDOW_PAGE_TOKENS = 32
"""vLLM's CPU attention takes pages of multiples of it, and all layers of a model have pages of one size."""


def refuse_untested_vllm() -> None:
    """Raises ValueError unless the installed vLLM is a tested one or the user insists."""
    version = installed_vllm()
    if version in TESTED_VLLM or os.environ.get(ALLOW_UNTESTED_VARIABLE) == "1":
        return
    raise ValueError(
        f"--kv-eviction was tested with vLLM {', '.join(TESTED_VLLM)}, but {version} is installed; install a tested one, "
        f"or set {ALLOW_UNTESTED_VARIABLE}=1 to run it untested, or serve without --kv-eviction"
    )


def refuse_unsupported(vllm_config: "VllmConfig", config: EvictionConfig, backend: Any = None) -> None:
    """Raises ValueError naming the first option or model property that eviction cannot serve.

    backend: the attention backend that the user named, if any."""
    objections = _objections(vllm_config, config, backend) | model_objections(vllm_config)
    for what, present in objections.items():
        if present:
            raise ValueError(f"--kv-eviction {config.policy} does not support {what}: {WAY_OUT}")
    _refuse_page_size(vllm_config)
    _refuse_kernels(vllm_config, config)
    _refuse_drafts(vllm_config, config)
    _refuse_budget(vllm_config, config)


def _objections(vllm_config: "VllmConfig", config: EvictionConfig, backend: Any) -> dict[str, object]:
    from vllm.platforms import current_platform

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    # A CPU has one backend, whatever a model's hook in vLLM writes here (Gemma 4's: models/config.py); only the user is obeyed.
    attention = backend if current_platform.is_cpu() else vllm_config.attention_config.backend
    staged, windows = parallel.pipeline_parallel_size > 1, has_windows(model)
    return {
        **gpu_objections(current_platform, vllm_config, config),
        "runner 'pooling' (embedding and scoring models)": model.runner_type != "generate",
        "MLA models (multi-head latent attention)": model.use_mla,
        "encoder-decoder models": model.is_encoder_decoder,
        "attention-free models": model.is_attention_free,
        "hybrid models (Mamba or linear attention beside attention)": model.is_hybrid,
        "models that read images in both directions (prefix-LM; --language-model-only serves their text)": model.is_mm_prefix_lm,
        "--disable-hybrid-kv-cache-manager for models with sliding-window layers": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and windows
        ),
        f"--kv-cache-dtype {cache.cache_dtype} (only auto, i.e. the model's dtype)": cache.cache_dtype
        not in ("auto", str(model.dtype).removeprefix("torch.")),
        "--enable-prefix-caching (the policy must observe every query of a sequence)": cache.enable_prefix_caching
        and config.policy_class.observes_every_query(),
        "KV offloading (--kv-offloading-size)": cache.kv_offloading_size,
        "KV connectors (--kv-transfer-config)": vllm_config.kv_transfer_config,
        "KV cache events (--kv-events-config)": getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False),
        "pipeline parallelism with --enforce-eager (vLLM 0.32.0's CPU workers end at the first step, also without eviction)": (
            staged and model.enforce_eager and current_platform.device_type == "cpu"
        ),
        "pipeline parallelism of models with sliding-window layers": staged and windows,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        f"--attention-backend {getattr(attention, 'name', attention)}": attention is not None
        and attention.name != BACKEND_NAMES.get(current_platform.device_type),
        "disabled chunked prefill (--no-enable-chunked-prefill)": not vllm_config.scheduler_config.enable_chunked_prefill,
    }


def model_objections(vllm_config: "VllmConfig") -> dict[str, object]:
    """What the model's configuration tells of its layers; what it does not is refused when they are built."""
    model, layers = vllm_config.model_config, full_layers(vllm_config)
    text = model.hf_text_config
    value_size = getattr(text, "v_head_dim", None)
    return {
        "models with KV sharing between layers": getattr(text, "num_kv_shared_layers", None),
        "models with logits soft-capping": getattr(text, "attn_logit_softcapping", None),
        f"models with key heads of {layers.head_size} and value heads of {value_size} numbers": (
            value_size not in (None, layers.head_size) and not getattr(text, "kv_lora_rank", None)
        ),
        f"models with {layers.count} full-attention layers and {layers.others} sliding-window layers (fewer than 1.5 times as "
        f"many as those)": layers.others and layers.count >= 1.5 * layers.others,
        f"models whose sliding-window layers have {layers.page_ratio:g} times the KV of their full-attention layers (a whole "
        f"number)": layers.page_ratio % 1,
    }


def _refuse_kernels(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    from vllm.platforms import current_platform

    from momentkv_vllm.kernels import CacheShape, select

    layers, model = full_layers(vllm_config), vllm_config.model_config
    shape = CacheShape(layers.head_size, int(vllm_config.cache_config.block_size * layers.page_ratio), model.dtype)
    select(config.kernels, current_platform.device_type, shape)


def _refuse_page_size(vllm_config: "VllmConfig") -> None:
    page_size = vllm_config.cache_config.block_size
    if page_size % 16:
        raise ValueError(f"--block-size {page_size} is not a multiple of 16, which --kv-eviction needs")
    if page_size % WINDOW_PAGE_TOKENS and has_windows(vllm_config.model_config):
        raise ValueError(
            f"--block-size {page_size} is not a multiple of {WINDOW_PAGE_TOKENS}, which the sliding-window layers of this model "
            f"need on a CPU; change it, or leave it out"
        )


def _refuse_drafts(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    """Speculative decoding by n-grams only: other drafters keep KV or hidden states of their own."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return
    # Draft tokens stop before an event, and a prefix hit starts at least one page before one.
    most = vllm_config.cache_config.block_size - 2
    objections = {
        f"method {drafts.method!r}; only 'ngram'": drafts.method != "ngram",
        f"num_speculative_tokens {drafts.num_speculative_tokens} above {most}, the page size less 2": (
            drafts.num_speculative_tokens > most
        ),
        "a policy that observes every query (rejected drafts too)": config.policy_class.observes_every_query(),
        "--scheduler-cls (drafts must stop before an eviction)": vllm_config.scheduler_config.scheduler_cls is not None,
    }
    for what, present in objections.items():
        if present:
            raise ValueError(
                f"--kv-eviction {config.policy} does not support --speculative-config with {what}: {WAY_OUT}"
            )


def _refuse_budget(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    """The budget must hold state and window; said here because here the user still sees it."""
    from momentkv_vllm.block_manager.spec import expected_schedule

    plan = expected_schedule(config, vllm_config)
    pool = vllm_config.cache_config.num_gpu_blocks_override
    step = vllm_config.max_in_flight_tokens
    need = plan.peak_pages(step) if plan.evict_in_prefill else plan.budget_pages
    if pool is not None and need > pool - 1:
        raise ValueError(
            f"--num-gpu-blocks-override {pool} leaves {pool - 1} pages of {plan.page_size} tokens, but a sequence needs up "
            f"to {need}: {plan.budget_pages} for --kv-budget {config.budget_tokens}, the rest for a prefill step of {step} "
            f"tokens; lower --max-num-batched-tokens or --kv-budget, or give it more pages"
        )
