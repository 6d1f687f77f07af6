"""What the block manager says at start-up, and the pool that it refuses."""

from vllm.logger import init_logger

from momentkv_vllm.config import BudgetClass
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.policies import origin
from momentkv_vllm.refuse import WITHOUT, refuse

logger = init_logger(f"vllm.{__name__}")


def refuse_pool_without_states(spec: MomentKVSpec, pool_pages: int, groups: int, caches_prefixes: bool) -> None:
    """Raises ValueError for a pool in which a request would wait for ever: beside its pages it has a block of each of the
    `groups` of layers that keep states, and where prefixes are cached a second one while the state moves on."""
    least = max(spec.blocks_of(schedule).least_pool(spec.step_tokens) for schedule in spec.schedules)
    states = groups * (2 if caches_prefixes else 1)
    if spec.splits_blocks and least + states > pool_pages:
        refuse(
            f"the KV pool has {pool_pages} blocks of {spec.block_size} tokens, but a sequence needs up to {least + states}: "
            f"{least} for --kv-budget {', '.join(spec.config.class_names)} and a step of {spec.step_tokens} tokens, {states} "
            f"for states of other layers",
            "lower --max-num-batched-tokens or --kv-budget",
            "give the KV cache more memory",
            WITHOUT,
        )


def announce(spec: MomentKVSpec, pool_pages: int) -> None:
    """The start-up lines of each budget class, and the refusal of a pool that cannot hold one sequence while it is prefilled."""
    for served, schedule in zip(spec.config.classes, spec.schedules, strict=True):
        blocks = spec.blocks_of(schedule)
        _refuse_pool(spec, served, schedule, blocks, pool_pages)
        if schedule.evicts:
            _announce_budget(spec, served, schedule, blocks, pool_pages)
        else:
            logger.info(
                "momentkv: requests with kv_budget %s keep all of up to %d tokens, %d blocks of the pool's %d",
                served.name, spec.most_tokens, blocks.budget, pool_pages,
            )  # fmt: skip
    if len(spec.schedules) > 1:
        logger.info(
            "momentkv: a request chooses by vllm_xargs {'kv_budget': name} of %s; %s is the default",
            ", ".join(spec.config.class_names), spec.config.class_names[0],
        )  # fmt: skip


def _refuse_pool(
    spec: MomentKVSpec, served: BudgetClass, schedule: PageSchedule, blocks: PageBlocks, pool_pages: int
) -> None:
    need = blocks.least_pool(spec.step_tokens)
    if need <= pool_pages:
        return
    if not schedule.evicts:
        refuse(
            f"the KV pool has {pool_pages} pages of {blocks.tokens} tokens, but a sequence with kv_budget {served.name!r} keeps "
            f"all of up to {spec.most_tokens} tokens, {need} pages",
            "lower --max-model-len",
            f"leave {served.name} out of --kv-budget",
            "give the KV cache more memory",
        )
    refuse(
        f"the KV pool has {pool_pages} pages of {blocks.tokens} tokens, but a sequence needs up to {need}: {blocks.budget} "
        f"for --kv-budget {served.config.budget_tokens} and {need - blocks.budget} for "
        f"{schedule.what_needs_pages(spec.step_tokens)}",
        "lower --max-num-batched-tokens, exact_prompt_tokens, prefill_retire_tokens or --kv-budget",
        "give the KV cache more memory",
        WITHOUT,
    )


def _announce_budget(
    spec: MomentKVSpec, served: BudgetClass, schedule: PageSchedule, blocks: PageBlocks, pool_pages: int
) -> None:
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
