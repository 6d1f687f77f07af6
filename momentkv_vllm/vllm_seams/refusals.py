"""Refuses, before anything is loaded, what eviction cannot serve: the server must never run silently without it.

One table: what, whether it is asked for, the way out. What only a layer knows is refused when it is built (attention/layer.py).
"""

import os
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import ALLOW_UNTESTED_VLLM
from momentkv_vllm.model_layers import full_layers, has_windows, keeps_states, sharing_layers
from momentkv_vllm.refuse import WITHOUT, Unsupported, refuse, refuse_first
from momentkv_vllm.versions import TESTED_VLLM, installed_vllm, tested
from momentkv_vllm.vllm_seams.bypasses import bypass_rows
from momentkv_vllm.vllm_seams.drafts import draft_rows, drafter_layers
from momentkv_vllm.vllm_seams.gpu import gpu_rows
from momentkv_vllm.vllm_seams.hybrids import hybrid_rows
from momentkv_vllm.vllm_seams.kv_dtypes import dtype_rows, refuse_fp8_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

STATE_PAGES = "momentkv_vllm.attention.state_pages.StatePages"
"""What workers need to keep states in files (--worker-extension-cls)."""
WIDE_PAGE_TOKENS = 32
"""vLLM's CPU attention takes pages of multiples of it, and all layers of a model have pages of one size."""

NOT_ON_CPUS = {
    "JambaForCausalLM": "Mamba1 layers",
    "OlmoHybridForCausalLM": "the kernels of OLMo Hybrid",
    "Qwen4ExpForCausalLM": "the kernels of Qwen4Exp",
    "Qwen4ExpForConditionalGeneration": "the kernels of Qwen4Exp",
    **dict.fromkeys(("MiniMaxM2ForCausalLM", "LagunaForCausalLM"), "experts that sigmoids choose from one group"),
}
"""Architectures that vLLM 0.32.0 cannot run on a CPU without eviction either, by what stands against it."""


def refuse_untested_vllm() -> None:
    """Raises ValueError unless the installed vLLM is a tested one or the user insists."""
    version = installed_vllm()
    if version not in TESTED_VLLM and not ALLOW_UNTESTED_VLLM.is_on():
        refuse(
            f"--kv-eviction was tested with vLLM {tested()}, but {version} is installed",
            "install a tested one", f"set {ALLOW_UNTESTED_VLLM.name}=1 to run it untested", WITHOUT,
        )  # fmt: skip


def refuse_unsupported(vllm_config: "VllmConfig", config: EvictionConfig, backend: Any = None) -> None:
    """Raises ValueError naming the first option or model property that eviction cannot serve.

    backend: the attention backend that the user named, if any."""
    from vllm.platforms import current_platform as platform

    rows = [
        *gpu_rows(platform, vllm_config, config),
        *_model_rows(vllm_config, platform),
        *hybrid_rows(vllm_config, platform),
        *dtype_rows(vllm_config, platform),
        *_cache_rows(vllm_config, config),
        *_parallel_rows(vllm_config, platform),
        *_engine_rows(vllm_config, config),
        *draft_rows(vllm_config, config, _has_own_scheduler(vllm_config)),
        *_state_rows(vllm_config, config),
        *bypass_rows(vllm_config, platform, backend),
    ]
    refuse_first(rows, f"--kv-eviction {config.policy}")
    _refuse_page_size(vllm_config)
    refuse_fp8_pages(vllm_config)
    _refuse_budget(vllm_config, config)


def _model_rows(vllm_config: "VllmConfig", platform: Any) -> list[Unsupported]:
    """What the model's configuration tells of its layers; what it does not is refused when they are built."""
    model, layers = vllm_config.model_config, full_layers(vllm_config)
    text, drafter = model.hf_text_config, drafter_layers(vllm_config)
    full = layers.count + drafter
    value_size = getattr(text, "v_head_dim", None)
    other_values = value_size not in (None, layers.head_size) and not getattr(text, "kv_lora_rank", None)
    lacks = NOT_ON_CPUS.get(model.architecture)
    text_only = "take its text alone with --language-model-only"
    return [
        Unsupported(f"{lacks}, which vLLM cannot run on a CPU (also without eviction)", lacks and platform.is_cpu()),
        Unsupported("runner 'pooling' (embedding and scoring models)", model.runner_type != "generate"),
        Unsupported("MLA models (multi-head latent attention)", model.use_mla),
        Unsupported("encoder-decoder models", model.is_encoder_decoder),
        Unsupported("attention-free models", model.is_attention_free),
        Unsupported("models that read images in both directions (prefix-LM)", model.is_mm_prefix_lm, text_only),
        Unsupported(
            f"models with key heads of {layers.head_size} and value heads of {value_size} numbers", other_values
        ),
        Unsupported(
            f"models with {full} full-attention layers and {layers.others} sliding-window layers (fewer than 1.5 times as many "
            f"as those{', with those of a drafter' if drafter else ''})",
            layers.others and full >= 1.5 * layers.others and not model.is_hybrid,
        ),
        Unsupported(
            f"models whose sliding-window layers have {layers.page_ratio:g} times the KV of their full-attention layers (a whole "
            f"number)",
            layers.page_ratio % 1,
        ),
    ]


def _cache_rows(vllm_config: "VllmConfig", config: EvictionConfig) -> list[Unsupported]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    events = getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False)
    leave_out = "leave the option out"
    return [
        Unsupported(
            "--disable-hybrid-kv-cache-manager for models with sliding-window layers",
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and has_windows(model),
            leave_out,
        ),
        Unsupported(
            "--enable-prefix-caching (the policy must observe every query of a sequence)",
            cache.enable_prefix_caching and config.policy_class.observes_every_query(),
            "leave the option out, take another policy",
        ),
        Unsupported(
            "--kv-sharing-fast-prefill (layers that share KV must see what the next eviction takes)",
            cache.kv_sharing_fast_prefill,
            leave_out,
        ),
        Unsupported("KV offloading (--kv-offloading-size)", cache.kv_offloading_size, leave_out),
        Unsupported("KV connectors (--kv-transfer-config)", vllm_config.kv_transfer_config, leave_out),
        Unsupported("KV cache events (--kv-events-config)", events, leave_out),
    ]


def _parallel_rows(vllm_config: "VllmConfig", platform: Any) -> list[Unsupported]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    staged = parallel.pipeline_parallel_size > 1
    other = "use tensor or data parallelism"
    return [
        Unsupported(
            "pipeline parallelism with --enforce-eager (vLLM 0.32.0's CPU workers end at the first step, also without eviction)",
            staged and model.enforce_eager and platform.device_type == "cpu",
            "leave --enforce-eager out",
        ),
        Unsupported("pipeline parallelism of models with sliding-window layers", staged and has_windows(model), other),
        Unsupported("decode context parallelism", parallel.decode_context_parallel_size > 1, other),
        Unsupported("prefill context parallelism", parallel.prefill_context_parallel_size > 1, other),
    ]


def _engine_rows(vllm_config: "VllmConfig", config: EvictionConfig) -> list[Unsupported]:
    scheduler = vllm_config.scheduler_config
    names = ", ".join(config.class_names)
    own, leave_out = _has_own_scheduler(vllm_config), "leave --scheduler-cls out, derive it from ours"
    coarse = f"prefill_retire_tokens={config.prefill_retire_tokens}" if config.prefill_retire_tokens else ""
    exact = f"prefill {config.prefill!r}" if config.prefill != "chunked" else ""
    return [
        Unsupported(
            "disabled chunked prefill (--no-enable-chunked-prefill)",
            not scheduler.enable_chunked_prefill,
            "leave the option out",
        ),
        # Our schedulers read such a session again (block_manager/scheduler.py); another one would answer wrongly.
        Unsupported(
            f"--scheduler-cls {scheduler.scheduler_cls} with {exact or coarse} (a session whose prompt grows after an eviction "
            f"must be read again)",
            own and (exact or coarse),
            f"{leave_out}, use prefill 'chunked' without prefill_retire_tokens",
        ),
        Unsupported(
            f"--scheduler-cls {scheduler.scheduler_cls} for models with KV sharing between layers (steps of prompt_logprobs must "
            f"end at evictions)",
            own and sharing_layers(vllm_config.model_config),
            leave_out,
        ),
        Unsupported(
            f"--scheduler-cls {scheduler.scheduler_cls} with --async-scheduling (a session whose prompt grows under a step in "
            f"flight must be read again)",
            own and scheduler.async_scheduling,
            f"{leave_out}, use --no-async-scheduling",
        ),
        Unsupported(
            f"--scheduler-cls {scheduler.scheduler_cls} with several budgets ({names}), of which a request chooses",
            own and len(config.classes) > 1,
            f"{leave_out}, give --kv-budget one number",
        ),
    ]


def _has_own_scheduler(vllm_config: "VllmConfig") -> bool:
    """Whether the user named a scheduler that knows nothing of the page schedule."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        return False
    # Imported late: vLLM's schedulers are not for processes that only parse options.
    from momentkv_vllm.block_manager.scheduler import RestartsSessions

    return not issubclass(scheduler.get_scheduler_cls(), RestartsSessions)


def _state_rows(vllm_config: "VllmConfig", config: EvictionConfig) -> list[Unsupported]:
    """States in files; what they need is asked for only if they are wanted."""
    folder, parallel = config.state_folder, vllm_config.parallel_config
    if folder is None:
        return []
    model = vllm_config.model_config
    keeps = config.state_share and config.prefill != "full" and vllm_config.cache_config.enable_prefix_caching
    keeps = keeps and not keeps_states(model) and not (config.prefill == "auto" and has_windows(model))
    what, leave_out = f"kv_eviction.state_folder {folder!r}", "leave the key out"
    return [
        Unsupported(f"{what} (there is no such folder)", not os.path.isdir(folder), f"make it, {leave_out}"),
        Unsupported(
            f"{what} without states (they need prefix caching, state_share above 0, prefill 'chunked' or 'auto', no hybrid "
            f"model, and with 'auto' no layer with a window)",
            not keeps,
            leave_out,
        ),
        Unsupported(
            f"{what} with --worker-extension-cls {parallel.worker_extension_cls}",
            parallel.worker_extension_cls != STATE_PAGES,
            f"leave the option out, {leave_out}",
        ),
        Unsupported(f"{what} with --scheduler-cls", _has_own_scheduler(vllm_config), leave_out),
    ]


def _refuse_page_size(vllm_config: "VllmConfig") -> None:
    page_size, leave_out = vllm_config.cache_config.block_size, "leave it out"
    if page_size % 16:
        refuse(f"--block-size {page_size} is not a multiple of 16, which --kv-eviction needs", leave_out, WITHOUT)
    if page_size % WIDE_PAGE_TOKENS and has_windows(vllm_config.model_config):
        refuse(
            f"--block-size {page_size} is not a multiple of {WIDE_PAGE_TOKENS}, which the sliding-window layers of this model "
            f"need on a CPU",
            "change it", leave_out, WITHOUT,
        )  # fmt: skip


def _refuse_budget(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    """The budget must hold state and window; said here because here the user still sees it."""
    from momentkv_vllm.kv_spec import expected_schedules
    from momentkv_vllm.page_blocks import PageBlocks

    pool = vllm_config.cache_config.num_gpu_blocks_override
    step = vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens
    for served, schedule in zip(config.classes, expected_schedules(config, vllm_config), strict=True):
        blocks = PageBlocks.of(schedule, vllm_config.cache_config.block_size)
        need = blocks.least_pool(step)
        if pool is None or need <= pool - 1:
            continue
        what = f"--kv-budget {served.config.budget_tokens}, the rest for {schedule.what_needs_pages(step)}"
        if not schedule.evicts:
            what = (
                f"--max-model-len {vllm_config.model_config.max_model_len} of requests with kv_budget {served.name!r}"
            )
        refuse(
            f"--num-gpu-blocks-override {pool} leaves {pool - 1} pages of {blocks.tokens} tokens, but a sequence needs up "
            f"to {need}: {blocks.budget} for {what}",
            "lower --max-num-batched-tokens, exact_prompt_tokens, prefill_retire_tokens or --kv-budget",
            "give it more pages", WITHOUT,
        )  # fmt: skip
