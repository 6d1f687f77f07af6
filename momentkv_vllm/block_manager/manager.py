"""The scheduler's side: frees retired pages to vLLM's pool, bounds admission, counts."""

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from momentkv_vllm.block_manager.metrics import PageMetrics
from momentkv_vllm.block_manager.spec import MomentKVSpec

logger = init_logger(f"vllm.{__name__}")


class MomentKVManager(FullAttentionManager):
    """Block manager of a group of evicting layers (vllm/v1/core/single_type_kv_cache_manager.py).

    It frees columns [S+M, boundary) of a request once the tokens that made the worker retire them are settled; the
    worker, which runs the same schedule, retired them at the end of the step that computed those tokens.
    """

    def __init__(self, kv_cache_spec: MomentKVSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.schedule = kv_cache_spec.schedule
        # Bounds what a waiting request must find free: with eviction it never holds its whole prompt.
        if self.schedule.evict_in_prefill:
            self.max_admission_blocks_per_request = self.schedule.peak_pages(kv_cache_spec.step_tokens)
        self.evicting: dict[str, int] = {}
        self.live_pages: dict[str, int] = {}
        self.metrics = PageMetrics(kv_cache_spec)
        _announce(kv_cache_spec, self.block_pool.num_gpu_blocks - 1)

    def allocate_new_blocks(self, request_id: str, *args, **kwargs) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(request_id, *args, **kwargs)
        self._count_live(request_id, len(blocks))
        return blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the schedule has retired at `processed_computed_tokens` settled tokens."""
        boundary = self.schedule.boundary(processed_computed_tokens, num_prompt_tokens or 0)
        before = self.evicting.get(request_id, 0)
        # A request that was preempted starts again at zero; its pages were all freed.
        if boundary <= before or request_id not in self.req_to_blocks:
            return
        kept = self.schedule.store_pages + self.schedule.moment_pages
        first = max(before, kept)
        self._remove_blocks_in_range(request_id, first, boundary)
        self.evicting[request_id] = boundary
        freed = boundary - first
        self._count_live(request_id, -freed)
        newly_evicted = self.schedule.evicted_tokens(boundary) - self.schedule.evicted_tokens(before)
        self.metrics.retired(pages=freed, tokens=newly_evicted, sequences=len(self.evicting))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        self.evicting.pop(request_id, None)
        self.live_pages.pop(request_id, None)
        self.metrics.live(sum(self.live_pages.values()), len(self.evicting))
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No cascade attention: store pages are private."""
        return 0

    def check_integrity(self) -> None:
        """Assert the bookkeeping. Raises AssertionError naming the request and the numbers."""
        owners: dict[int, str] = {}
        for request_id, blocks in self.req_to_blocks.items():
            boundary = self.evicting.get(request_id, 0)
            kept = self.schedule.store_pages + self.schedule.moment_pages
            for column, block in enumerate(blocks):
                retired = kept <= column < boundary
                assert block.is_null == retired, (
                    f"{request_id}: column {column} null={block.is_null}, boundary {boundary}"
                )
                if not retired:
                    other = owners.setdefault(block.block_id, request_id)
                    assert other == request_id, f"page {block.block_id} belongs to {other} and {request_id}"
                    assert block.ref_cnt == 1, f"{request_id}: page {block.block_id} has {block.ref_cnt} owners"
            live = sum(not b.is_null for b in blocks)
            assert live == self.live_pages.get(request_id, 0), f"{request_id}: {live} live pages, counted otherwise"
            cap = self.max_admission_blocks_per_request
            assert cap is None or live <= cap, f"{request_id}: {live} live pages exceed the admission bound {cap}"
        free = self.block_pool.get_num_free_blocks()
        total = self.block_pool.num_gpu_blocks - 1
        assert len(owners) + free == total, f"{len(owners)} owned + {free} free pages != {total}"

    def _count_live(self, request_id: str, change: int) -> None:
        if change:
            self.live_pages[request_id] = self.live_pages.get(request_id, 0) + change
            self.metrics.live(sum(self.live_pages.values()), len(self.evicting))


def _announce(spec: MomentKVSpec, pool_pages: int) -> None:
    """The start-up line, and the refusal of a pool that cannot hold one sequence while it is prefilled."""
    plan = spec.schedule
    budget = plan.budget_pages
    need = plan.peak_pages(spec.step_tokens) if plan.evict_in_prefill else budget
    if need > pool_pages:
        raise ValueError(
            f"the KV pool has {pool_pages} pages of {plan.page_size} tokens, but a sequence needs up to {need}: {budget} "
            f"for --kv-budget {spec.config.budget_tokens} and {need - budget} for a prefill step of {spec.step_tokens} "
            f"tokens; lower --max-num-batched-tokens or --kv-budget, or give the KV cache more memory"
        )
    logger.info(
        "momentkv: policy %s, budget %d tokens = %d pages of %d (store %d, moments %d, window %d), state %d bytes a "
        "sequence and layer (%.0f %% of the budget), pool %d pages: about %d sequences at full budget",
        spec.config.policy, plan.first_event, budget, plan.page_size, plan.store_pages, plan.moment_pages,
        plan.window_pages, spec.state_bytes, 100 * plan.moment_pages / budget, pool_pages, pool_pages // budget,
    )  # fmt: skip
    if 3 * plan.moment_pages > budget:
        logger.warning(
            "momentkv: the moment state takes %d of %d budget pages, more than a third; a larger --kv-budget, a smaller "
            "--block-size, or --kv-eviction-config.correction zeroth leaves more room for tokens",
            plan.moment_pages, budget,
        )  # fmt: skip
