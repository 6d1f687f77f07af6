"""The scheduler's side: frees retired pages to vLLM's pool, bounds admission, keeps shared prefixes out of harm's way, counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from momentkv_vllm.block_manager.integrity import ChecksIntegrity
from momentkv_vllm.block_manager.metrics import PageMetrics
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_schedule import ANY_PROMPT
from momentkv_vllm.policies import origin
from momentkv_vllm.refuse import WITHOUT, refuse

logger = init_logger(f"vllm.{__name__}")


@dataclass
class PrefixState:
    """Where a request that has pages stands with the prefix cache.

    step_end_tokens: tokens at the end of the step it was scheduled for last.
    uncached: the request, while it may have filled pages that are not in the cache; None before the first and once sealed.
    sealed: its pages that will be rewritten have left the cache, and none come in.
    """

    step_end_tokens: int
    uncached: Request | None = None
    sealed: bool = False


class MomentKVManager(ChecksIntegrity, FullAttentionManager):
    """Block manager of a group of evicting layers (vllm/v1/core/single_type_kv_cache_manager.py).

    It frees columns [S+M, boundary) of a request once the tokens that made the worker retire them are settled; the
    worker, which runs the same schedule, retired them at the end of the step that computed those tokens.

    Prefix caching: the worker rewrites columns [0, S+M) from the first event on. Such a page must have a single owner, and must
    leave the prefix cache before it is rewritten. If the policy observes attention, all pages of the budget have a single
    owner, because observations are stored per page.

    * A hit page that somebody else owns is copied for the new request; one that nobody owns is taken as it is. So a hit
      never needs more free pages than the same request without one.
    * Before the step that reaches its first event a request is sealed: a copy of each of its cached pages takes their place
      in the cache. The copies ride on vLLM's own list, which the worker runs before that step.
    * Pages are cached a step after they were scheduled, because those copies run before the step's own stores; the pages of
      its last step when a request gives them back.
    """

    def __init__(self, kv_cache_spec: MomentKVSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.schedule = kv_cache_spec.schedule
        # Bounds what a waiting request must find free: with eviction it never holds its whole prompt.
        if self.schedule.exact_prompt_tokens < ANY_PROMPT:
            self.max_admission_blocks_per_request = self.schedule.least_pool_pages(kv_cache_spec.step_tokens)
        self.evicting: dict[str, int] = {}
        self.live_pages: dict[str, int] = {}
        self.prefixes: dict[str, PrefixState] = {}
        # Sums over requests, so that counting costs the same for one sequence and for a thousand.
        self.total_live = self.total_retired = 0
        self.metrics = PageMetrics(kv_cache_spec, self.block_pool.num_gpu_blocks - 1)
        _announce(kv_cache_spec, self.block_pool.num_gpu_blocks - 1)

    @property
    def rewritten_pages(self) -> int:
        """S+M: columns before this one are rewritten once the request evicts."""
        return self.schedule.store_pages + self.schedule.moment_pages

    @property
    def private_pages(self) -> int:
        """Columns before this one have a single owner. Observed attention is kept by page, so what is observed is not shared."""
        return self.schedule.budget_pages if self.kv_cache_spec.observes_attention else self.rewritten_pages

    @classmethod
    def find_longest_cache_hit(cls, *, max_length: int, kv_cache_spec: MomentKVSpec, **kwargs):
        """As vLLM's, but never past what a request must compute itself for its first event."""
        max_length = min(max_length, kv_cache_spec.cacheable_tokens)
        return super().find_longest_cache_hit(max_length=max_length, kv_cache_spec=kv_cache_spec, **kwargs)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> int:
        """As vLLM's, plus the pages for copies of hit pages that others own."""
        pages = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        return pages + sum(b.ref_cnt > 0 for b in new_computed_blocks[: self.private_pages])

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> None:
        """Give a new request its hit pages; those that it must not share become its own."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        copied_from = {copy.block_id: source for source, copy in self._pending_cow_copies}
        for column, block in enumerate(new_computed_blocks[: self.private_pages]):
            if block.ref_cnt > 1:
                self._make_private(request_id, column, copied_from.get(block.block_id, block))
        self._count_live(request_id, len(new_computed_blocks))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        self.prefixes.setdefault(request_id, PrefixState(0)).step_end_tokens = num_tokens_main_model
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._count_live(request_id, len(blocks))
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """Cache the pages that earlier steps have filled, until the request's last chance before its first event."""
        state = self.prefixes[request.request_id]
        if state.sealed:
            return
        state.uncached = request
        filled = min(num_tokens, request.num_computed_tokens, self.kv_cache_spec.cacheable_tokens)
        super().cache_blocks(request, filled, *args, **kwargs)
        # `num_tokens` leaves out a token that is still in flight (async scheduling), the step does not.
        if state.step_end_tokens >= self.schedule.first_event_tokens:
            state.sealed, state.uncached = True, None
            self._seal(request.request_id)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the schedule has retired at `processed_computed_tokens` settled tokens."""
        boundary = self.schedule.boundary_column(processed_computed_tokens, num_prompt_tokens or 0)
        before = self.evicting.get(request_id, 0)
        # A request that was preempted starts again at zero; its pages were all freed.
        if boundary <= before or request_id not in self.req_to_blocks:
            return
        first = max(before, self.rewritten_pages)
        self._remove_blocks_in_range(request_id, first, boundary)
        self.evicting[request_id] = boundary
        freed = boundary - first
        self.total_retired += freed
        self._count_live(request_id, -freed)
        newly_evicted = self.schedule.evicted_tokens(boundary) - self.schedule.evicted_tokens(before)
        self.metrics.retired(pages=freed, tokens=newly_evicted)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's, for a request that ends or is preempted. What its last step has filled is cached first."""
        self._cache_last_step(self.prefixes.pop(request_id, None))
        blocks = super().pop_blocks_for_free(request_id)
        self.total_retired -= max(0, self.evicting.pop(request_id, 0) - self.rewritten_pages)
        self.total_live -= self.live_pages.pop(request_id, 0)
        self._publish()
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No cascade attention: store pages are private."""
        return 0

    def _cache_last_step(self, state: PrefixState | None) -> None:
        if state is None or state.uncached is None:
            return
        request = state.uncached
        filled = min(request.num_tokens, request.num_computed_tokens, self.kv_cache_spec.cacheable_tokens)
        super().cache_blocks(request, filled, replay_boundaries=())

    def _make_private(self, request_id: str, column: int, source: KVCacheBlock) -> None:
        """Replace a shared hit page by a copy of `source`, the page that holds its content before the coming step.

        Both ends of the copy stay referenced until vLLM has handed the list over (Scheduler._free_cow_retained_blocks).
        """
        blocks = self.req_to_blocks[request_id]
        shared, (copy,) = blocks[column], self.block_pool.get_new_blocks(1)
        blocks[column] = copy
        self._copy_before_step(source, copy)
        copy.ref_cnt += 1
        self.block_pool.free_blocks([shared])

    def _seal(self, request_id: str) -> None:
        """Take the request's pages that will be rewritten out of the prefix cache, leaving copies there."""
        cached = [b for b in self.req_to_blocks[request_id][: self.rewritten_pages] if b.block_hash is not None]
        # Only pages that this step cannot need: a copy must never be the reason for a preemption.
        step_pages = self.kv_cache_spec.step_tokens // self.block_size + len(self.req_to_blocks)
        spare = max(0, self.block_pool.get_num_free_blocks() - step_pages)
        copies = self.block_pool.get_new_blocks(min(spare, len(cached)))
        for page, copy in zip(cached, copies, strict=False):
            self.block_pool.move_block_hashes(page, copy)
            self._copy_before_step(page, copy)
        self.block_pool.evict_blocks({page.block_id for page in cached[len(copies) :]})

    def _copy_before_step(self, source: KVCacheBlock, copy: KVCacheBlock) -> None:
        """Put a copy on the list that vLLM hands to the worker with the step (take_pending_cow_copies)."""
        source.ref_cnt += 1
        self._pending_cow_copies.append((source, copy))

    def _count_live(self, request_id: str, change: int) -> None:
        if change:
            self.live_pages[request_id] = self.live_pages.get(request_id, 0) + change
            self.total_live += change
            self._publish()

    def _publish(self) -> None:
        self.metrics.holdings(self.total_live, self.total_retired, len(self.live_pages), len(self.evicting))


def _announce(spec: MomentKVSpec, pool_pages: int) -> None:
    """The start-up line, and the refusal of a pool that cannot hold one sequence while it is prefilled."""
    schedule = spec.schedule
    budget = schedule.budget_pages
    need = schedule.least_pool_pages(spec.step_tokens)
    if need > pool_pages:
        refuse(
            f"the KV pool has {pool_pages} pages of {schedule.page_size} tokens, but a sequence needs up to {need}: {budget} "
            f"for --kv-budget {spec.config.budget_tokens} and {need - budget} for a prefill step of {spec.step_tokens} "
            f"tokens",
            "lower --max-num-batched-tokens or --kv-budget",
            "give the KV cache more memory",
            WITHOUT,
        )
    logger.info(
        "momentkv: policy %s (%s), budget %d tokens = %d pages of %d (store %d, moments %d, window %d), state %d bytes a "
        "sequence and layer (%.0f %% of the budget), pool %d pages: about %d sequences at full budget",
        spec.config.policy, origin(spec.config.policy), schedule.first_event_tokens, budget, schedule.page_size,
        schedule.store_pages, schedule.moment_pages, schedule.window_pages, spec.state_bytes,
        100 * schedule.moment_pages / budget, pool_pages, pool_pages // budget,
    )  # fmt: skip
    if schedule.is_packed:
        logger.info(
            "momentkv: store_dtype %s holds %d tokens in the memory of %d; nothing is evicted until it is full",
            spec.config.store_dtype, schedule.held_tokens, schedule.first_event_tokens,
        )  # fmt: skip
    if 3 * schedule.moment_pages > budget:
        logger.warning(
            "momentkv: the moment state takes %d of %d budget pages, more than a third; a larger --kv-budget, a smaller "
            "--block-size, or --kv-eviction-config.correction zeroth leaves more room for tokens",
            schedule.moment_pages, budget,
        )  # fmt: skip
