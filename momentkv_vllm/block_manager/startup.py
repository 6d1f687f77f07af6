"""What the block manager says at start-up, and the pool that it refuses."""

from vllm.logger import init_logger

from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.policies import origin
from momentkv_vllm.refuse import WITHOUT, refuse

logger = init_logger(f"vllm.{__name__}")


def refuse_pool_without_states(spec: MomentKVSpec, pool_pages: int, groups: int, caches_prefixes: bool) -> None:
    """Raises ValueError for a pool in which a request would wait for ever: beside its pages it has a block of each of the
    `groups` of layers that keep states, and where prefixes are cached a second one while the state moves on."""
    least, states = spec.blocks.least_pool(spec.step_tokens), groups * (2 if caches_prefixes else 1)
    if spec.splits_blocks and least + states > pool_pages:
        refuse(
            f"the KV pool has {pool_pages} blocks of {spec.block_size} tokens, but a sequence needs up to {least + states}: "
            f"{least} for --kv-budget {spec.config.budget_tokens} and a step of {spec.step_tokens} tokens, {states} for states "
            f"of other layers",
            "lower --max-num-batched-tokens or --kv-budget",
            "give the KV cache more memory",
            WITHOUT,
        )


def announce(spec: MomentKVSpec, pool_pages: int) -> None:
    """The start-up line, and the refusal of a pool that cannot hold one sequence while it is prefilled."""
    schedule, blocks = spec.schedule, spec.blocks
    need = blocks.least_pool(spec.step_tokens)
    if need > pool_pages:
        refuse(
            f"the KV pool has {pool_pages} pages of {blocks.tokens} tokens, but a sequence needs up to {need}: {blocks.budget} "
            f"for --kv-budget {spec.config.budget_tokens} and {need - blocks.budget} for "
            f"{schedule.what_needs_pages(spec.step_tokens)}",
            "lower --max-num-batched-tokens, exact_prompt_tokens, prefill_retire_tokens or --kv-budget",
            "give the KV cache more memory",
            WITHOUT,
        )
    budget = schedule.budget_pages
    logger.info(
        "momentkv: policy %s (%s), budget %d tokens = %d pages of %d (store %d, moments %d, window %d), state %d bytes a "
        "sequence and layer (%.0f %% of the budget), pool %d pages: about %d sequences at full budget",
        spec.config.policy, origin(spec.config.policy), schedule.first_event_tokens, budget, schedule.page_size,
        schedule.store_pages, schedule.moment_pages, schedule.window_pages, spec.state_bytes,
        100 * spec.state_bytes * blocks.pages / (budget * spec.page_size_bytes), pool_pages, pool_pages // blocks.budget,
    )  # fmt: skip
    if schedule.reading_pages > budget:
        logger.info(
            "momentkv: while its prompt is read, a sequence evicts every %d tokens (prefill_retire_tokens) and holds up to %d "
            "pages",
            schedule.prefill_retire_tokens, schedule.reading_pages,
        )  # fmt: skip
    if blocks.pages > 1:
        logger.info(
            "momentkv: pages lie in vLLM's blocks of %d tokens, which the pool counts: a sequence holds up to %d at full budget",
            blocks.tokens, blocks.budget,
        )  # fmt: skip
    if schedule.is_packed:
        logger.info(
            "momentkv: store_dtype %s holds %d tokens in the memory of %d; nothing is evicted until it is full%s",
            spec.config.store_dtype, schedule.held_tokens, schedule.first_event_tokens,
            ", then heads that look far hold more of it" if schedule.equal_tokens else "",
        )  # fmt: skip
    if 3 * schedule.moment_pages > budget:
        logger.warning(
            "momentkv: the moment state takes %d of %d budget pages, more than a third; a larger --kv-budget, a smaller "
            "--block-size, or --kv-eviction-config.correction zeroth leaves more room for tokens",
            schedule.moment_pages, budget,
        )  # fmt: skip
