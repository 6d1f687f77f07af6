"""The engine core's figures: what the block manager's books say, kept as running totals."""

from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.metrics import (
    BUDGET_PAGES,
    CORE_METRICS,
    EVICTED_TOKENS,
    FREED_BYTES,
    HELD_TOKENS,
    LIVE_PAGES,
    POOL_PAGES,
    RETIRED_PAGES,
    SEQUENCES,
    STATE_HITS,
    STATE_LOOKUPS,
    STATE_MISSED_TOKENS,
    STATE_SAVED_TOKENS,
    STATES,
    STOCK_PAGES,
    TOKENS,
    MetricWriter,
)


class PageMetrics(MetricWriter):
    """One engine's pages and sequences (momentkv_vllm/metrics.py); pages are vLLM's blocks, and where these hold several pages
    of the schedule, those of store and moments count as store."""

    def __init__(self, spec: MomentKVSpec, pool_pages: int) -> None:
        super().__init__(CORE_METRICS, spec.model_name, spec.engine)
        self._blocks, self._moment_pages = spec.blocks, 0 if spec.splits_blocks else spec.schedule.moment_pages
        self._page_bytes = spec.page_bytes
        self.set(POOL_PAGES, pool_pages)
        self.set(BUDGET_PAGES, spec.blocks.budget)
        self.set(HELD_TOKENS, spec.schedule.held_tokens)

    def retired(self, pages: int, tokens: int) -> None:
        """Pages were freed and tokens evicted."""
        self.add(RETIRED_PAGES, pages)
        self.add(EVICTED_TOKENS, tokens)
        self.add(FREED_BYTES, pages * self._page_bytes)

    def looked_up(self, start: int, known: int) -> None:
        """A request beyond the budget was admitted: `start` tokens came with a state (0: none), and up to `known` an earlier
        request had the same text."""
        self.add(STATE_LOOKUPS, 1)
        self.add(STATE_HITS, start > 0)
        self.add(STATE_SAVED_TOKENS, start)
        self.add(STATE_MISSED_TOKENS, max(0, known - start))

    def states_held(self, states: int) -> None:
        self.set(STATES, states)

    def holdings(self, live_pages: int, absent_pages: int, evicted: int, sequences: int, evicting: int) -> None:
        """State of all sequences: pages they own and retired, tokens they evicted; how many own any page, how many evict."""
        store, moments = evicting * (self._blocks.rewritten - self._moment_pages), evicting * self._moment_pages
        for index, pages in enumerate((store, moments, live_pages - store - moments)):
            self.set(LIVE_PAGES, pages, index)
        self.set(STOCK_PAGES, live_pages + absent_pages)
        self.set(TOKENS, (live_pages + absent_pages) * self._blocks.tokens - evicted, 0)
        self.set(TOKENS, evicted, 1)
        self.set(SEQUENCES, sequences - evicting, 0)
        self.set(SEQUENCES, evicting, 1)
