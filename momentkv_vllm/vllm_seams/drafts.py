"""Speculative decoding: what of it eviction serves, and a patch of vLLM's CPU worker (ledger: vllm_seams/__init__.py).

A drafter with attention layers of its own (a draft model, EAGLE, MTP) keeps KV beside the model's, in the same pages. Its layers
evict when the model's do, in the pass that follows the model's. So that pass must follow every step. vLLM leaves it out where one
row of the batch is so long that its drafts could pass --max-model-len; it is made then, and no tokens are drafted.

Layers with a window have groups of pages of their own. vLLM gives EAGLE and MTP the pages of their layers' group, but a draft
model those of the first group, whichever that is: here it gets its own.
"""

import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.model_layers import full_layers, has_windows, heads_differ, keeps_states, sharing_layers
from momentkv_vllm.refuse import Unsupported
from momentkv_vllm.vllm_seams.requests import class_names_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

WITHOUT_LAYERS = ("ngram",)
"""Methods that look drafts up."""
WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
"""Methods whose drafter attends."""
OPTION = "--speculative-config with"


def keeps_layers(vllm_config: Any) -> bool:
    """Whether a drafter has layers with a cache."""
    drafts = vllm_config.speculative_config
    return drafts is not None and drafts.method not in WITHOUT_LAYERS


def drafter_layers(vllm_config: Any) -> int:
    """How many layers a drafter adds to those that evict, as far as is served."""
    drafts = vllm_config.speculative_config
    if drafts is None or drafts.method not in WITH_LAYERS:
        return 0
    return 1 if drafts.method == "mtp" else drafts.draft_model_config.get_total_num_hidden_layers()


def draft_rows(vllm_config: "VllmConfig", config: EvictionConfig, own_scheduler: bool) -> list[Unsupported]:
    """What eviction cannot serve of speculative decoding."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return []
    # Draft tokens stop before an event, and a prefix hit starts at least one page before one.
    most, given = vllm_config.cache_config.block_size - 2, drafts.num_speculative_tokens
    known = (*WITHOUT_LAYERS, *WITH_LAYERS)
    rows = [
        Unsupported(
            f"{OPTION} method {drafts.method!r} (only {', '.join(map(repr, known))})",
            drafts.method not in known,
            "use one of these",
        ),
        Unsupported(
            f"{OPTION} num_speculative_tokens {given} above {most}, the page size less 2",
            given > most,
            f"use 1 to {most}",
        ),
        Unsupported(
            f"{OPTION} a policy that observes every query (rejected drafts too)",
            config.policy_class.observes_every_query(),
            "take another policy",
        ),
        Unsupported(
            f"{OPTION} --scheduler-cls (drafts must stop before an eviction)",
            own_scheduler,
            "leave --scheduler-cls out",
        ),
    ]
    return rows + _rows_of_layers(vllm_config, config) if drafts.method in WITH_LAYERS else rows


def _rows_of_layers(vllm_config: "VllmConfig", config: EvictionConfig) -> list[Unsupported]:
    """Of drafters whose layers evict beside the model's: in one group of pages, by one block table."""
    drafts, model, parallel = vllm_config.speculative_config, vllm_config.model_config, vllm_config.parallel_config
    draft = drafts.draft_model_config
    what, ngram = f"{OPTION} method {drafts.method!r}", "use 'ngram'"
    kind = getattr(draft.hf_config, "model_type", "")
    return [
        Unsupported(f"{what} and parallel_drafting", drafts.parallel_drafting, "leave parallel_drafting out"),
        Unsupported(
            f"{what} of {kind!r} (its layers read the model's cache, or lie in several groups)",
            drafts.use_gemma4_mtp() or drafts.use_step3p5_mtp(),
            ngram,
        ),
        Unsupported(
            f"{what} and num_speculative_tokens {drafts.num_speculative_tokens} of a model with several modules for them",
            drafts.use_multi_module_mtp(),
            f"use 1, {ngram}",
        ),
        Unsupported(f"{what} and a drafter with MLA", draft.use_mla, ngram),
        Unsupported(f"{what} and a drafter whose layers keep states", keeps_states(draft), ngram),
        Unsupported(
            f"{what} and a drafter with sliding-window layers (vLLM wants its layers in one group of pages)",
            has_windows(draft),
            ngram,
        ),
        Unsupported(
            f"{what} for models whose full-attention and sliding-window layers have other heads",
            has_windows(model) and heads_differ(model),
            ngram,
        ),
        Unsupported(f"{what} for models with KV sharing between layers", sharing_layers(model), ngram),
        *_rows_of_heads(vllm_config, config, what, ngram),
        Unsupported(
            f"{what} and a drafter for {draft.max_model_len} tokens, less than --max-model-len {model.max_model_len} (its layers "
            f"must see every step)",
            draft.max_model_len < model.max_model_len,
            f"use --max-model-len {draft.max_model_len}, {ngram}",
        ),
        Unsupported(
            f"{what} and kv_cache_dtype {drafts.kv_cache_dtype!r}",
            drafts.kv_cache_dtype not in (None, "auto"),
            "leave kv_cache_dtype out",
        ),
        Unsupported(f"{what} and pipeline parallelism", parallel.pipeline_parallel_size > 1, ngram),
        Unsupported(
            f"{what} and kv_eviction.state_folder {config.state_folder!r} (a file does not say whose drafts its pages are of)",
            config.state_folder,
            "leave the key out",
        ),
    ]


def _rows_of_heads(vllm_config: "VllmConfig", config: EvictionConfig, what: str, ngram: str) -> list[Unsupported]:
    """Of drafters whose KV heads differ from the model's."""
    from momentkv_vllm.kv_spec import shares_schedules

    (heads, size, dtype), (draft_heads, draft_size, draft_dtype) = shapes = _shapes(vllm_config)
    slides = has_windows(vllm_config.model_config)
    return [
        Unsupported(
            f"{what} and a drafter of {draft_dtype} for a model of {dtype}",
            draft_dtype != dtype,
            f"give both one dtype, {ngram}",
        ),
        Unsupported(
            f"{what} for models with sliding-window layers and a drafter with {draft_heads} KV heads of {draft_size} numbers "
            f"(the model has {heads} of {size}, and all layers share one size of page)",
            slides and shapes[0] != shapes[1],
            f"take a drafter with the model's KV heads, {ngram}",
        ),
        Unsupported(
            f"{what} and a drafter whose heads have {draft_size} numbers (the model's have {size}; with these settings store and "
            f"moments of the one take other pages than those of the other, and both read one block table)",
            size != draft_size and not shares_schedules(config, vllm_config, draft_size),
            f"use store_dtype 'model', take a drafter with heads of {size}, {ngram}",
        ),
    ]


def say_where_nothing_is_drafted(vllm_config: "VllmConfig", config: EvictionConfig) -> None:
    """A warning about budgets beyond which every token is observed, so that none is drafted."""
    from momentkv_vllm.kv_spec import expected_schedules

    if vllm_config.speculative_config is None or config.policy_class.observes is None:
        return
    for served, schedule in zip(config.classes, expected_schedules(config, vllm_config), strict=True):
        if served.evicts and schedule.retire_tokens <= served.config.observation_tokens + 1:
            logger.warning(
                "momentkv: with --kv-budget %d no tokens are drafted once a sequence evicts: its evictions are %d tokens apart "
                "(retire_tokens), and the last %d before each are observed (observation_tokens); raise the one, say to %d, or "
                "lower the other",
                served.config.budget_tokens, schedule.retire_tokens, served.config.observation_tokens,
                4 * served.config.observation_tokens,
            )  # fmt: skip


def _shapes(vllm_config: "VllmConfig") -> list[tuple[int, int, str]]:
    """(KV heads, their size, dtype) of the model's layers and of the drafter's."""
    model, draft = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    sizes = full_layers(vllm_config).head_size, draft.get_head_size()
    return [
        (m.get_num_kv_heads(vllm_config.parallel_config), size, str(m.dtype).removeprefix("torch."))
        for m, size in zip((model, draft), sizes, strict=True)
    ]


def patch_drafters() -> None:
    """Wrap two methods of the model runner; calling it again does nothing."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner.propose_draft_token_ids, "_momentkv_patched", False):
        return
    fits, propose = CPUModelRunner._input_fits_in_drafter, CPUModelRunner.propose_draft_token_ids

    @functools.wraps(fits)
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        fitting = fits(self, common_attn_metadata)
        # Asked before every proposal (sample_tokens), which then knows.
        self.momentkv_only_follows = not fitting and _evicts_in_drafter(self)
        return fitting or self.momentkv_only_follows

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.momentkv_only_follows:
            scheduler_output = replace(scheduler_output, num_spec_tokens_to_schedule=0)
        if self.speculative_config.uses_draft_model() and _evicts_in_drafter(self):
            args = [_with_pages_of_the_drafter(self, x) if isinstance(x, CommonAttentionMetadata) else x for x in args]
        return propose(self, scheduler_output, *args, **kwargs)

    propose_draft_token_ids._momentkv_patched = True
    CPUModelRunner._input_fits_in_drafter = _input_fits_in_drafter
    CPUModelRunner.propose_draft_token_ids = propose_draft_token_ids


def _evicts_in_drafter(runner: Any) -> bool:
    return bool(class_names_of(runner)) and keeps_layers(runner.vllm_config)


def _with_pages_of_the_drafter(runner: Any, common: Any) -> Any:
    """A step's CommonAttentionMetadata with the pages and slots of the drafter's group; vLLM's are group 0's
    (GPUModelRunner._build_attention_metadata)."""
    table = runner.input_batch.block_table[runner.drafter.kv_cache_gid]
    return replace(
        common,
        block_table_tensor=table.get_device_tensor(common.num_reqs),
        slot_mapping=table.slot_mapping.gpu[: common.num_actual_tokens],
    )
