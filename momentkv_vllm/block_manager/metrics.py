"""The engine core's figures: what the block manager's books say, kept as running totals."""

from collections.abc import Sequence

from momentkv_vllm.block_manager.class_books import ClassBooks
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
    of_classes,
)


class PageMetrics(MetricWriter):
    """One engine's pages and sequences (momentkv_vllm/metrics.py); pages are vLLM's blocks, and where these hold several pages
    of the schedule, those of store and moments count as store."""

    def __init__(self, spec: MomentKVSpec, pool_pages: int) -> None:
        self._class_budget, self._class_pages, self._class_sequences, self._class_evicted = by_class = of_classes(
            spec.config.class_names
        )
        super().__init__([*CORE_METRICS, *by_class], spec.model_name, spec.engine)
        self._block_tokens, self._moment_pages = (
            spec.blocks.tokens,
            0 if spec.splits_blocks else spec.schedule.moment_pages,
        )
        self._page_bytes = spec.page_bytes
        self.set(POOL_PAGES, pool_pages)
        self.set(BUDGET_PAGES, spec.blocks.budget)
        self.set(HELD_TOKENS, spec.schedule.held_tokens)
        for number, schedule in enumerate(spec.schedules):
            self.set(self._class_budget, spec.blocks_of(schedule).budget, number)

    def retired(self, number: int, pages: int, tokens: int) -> None:
        """Pages of a sequence of the class of that number were freed and tokens evicted."""
        self.add(self._class_evicted, tokens, number)
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

    def holdings(self, classes: Sequence[ClassBooks]) -> None:
        """State of all sequences, by class."""
        for books in classes:
            self.set(self._class_pages, books.live, books.number)
            self.set(self._class_sequences, books.sequences, books.number)
        live, evicting = sum(b.live for b in classes), sum(b.evicting for b in classes)
        evicted, columns = sum(b.evicted for b in classes), live + sum(b.retired for b in classes)
        moments = evicting * self._moment_pages
        store = sum(b.evicting * b.rewritten for b in classes) - moments
        for index, pages in enumerate((store, moments, live - store - moments)):
            self.set(LIVE_PAGES, pages, index)
        self.set(STOCK_PAGES, columns)
        self.set(TOKENS, columns * self._block_tokens - evicted, 0)
        self.set(TOKENS, evicted, 1)
        self.set(SEQUENCES, sum(b.sequences for b in classes) - evicting, 0)
        self.set(SEQUENCES, evicting, 1)
