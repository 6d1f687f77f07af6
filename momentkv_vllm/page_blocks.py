"""Pages inside vLLM's blocks: what a sequence holds of them.

vLLM gives all layers of a model blocks of the same bytes. Where one of its layers keeps a state (Mamba, gated DeltaNet, short
convolutions), a block is as large as that: hundreds of tokens. It is then split into pages, and a sequence holds the blocks that
hold its pages. Elsewhere a block is a page.
"""

from dataclasses import dataclass

from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule, cdiv


@dataclass(frozen=True)
class PageBlocks:
    """schedule: in pages; pages: those of a block."""

    schedule: PageSchedule
    pages: int = 1

    @classmethod
    def of(cls, schedule: PageSchedule, block_size: int) -> "PageBlocks":
        """Blocks of `block_size` tokens. Before loading that may be less than a page of layers that evict beside larger ones
        (model_layers.py, page_ratio): vLLM makes such a block a page."""
        return cls(schedule, max(1, block_size // schedule.page_size))

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.pages * self.schedule.page_size

    @property
    def rewritten(self) -> int:
        """Blocks that hold store and moments, wholly or in part: never freed while the sequence lives."""
        return cdiv(self.schedule.store_pages + self.schedule.moment_pages, self.pages) if self.schedule.evicts else 0

    def retired(self, boundary_column: int) -> int:
        """First block that is not wholly retired once every page before `boundary_column` is; those rewritten stay."""
        return max(self.rewritten, boundary_column // self.pages) if boundary_column else 0

    @property
    def budget(self) -> int:
        """Most blocks of a sequence at its budget: the pages rounded up, and one more where the window lies across blocks."""
        return self._held(self.schedule.budget_pages)

    def least_pool(self, step_tokens: int) -> int:
        """Blocks that a pool must have for one sequence, as `PageSchedule.least_pool_pages`."""
        if not self.schedule.evicts or self.schedule.exact_prompt_tokens >= ANY_PROMPT:
            return self.budget
        whole = cdiv(self.schedule.least_pool_pages(step_tokens), self.pages)
        return max(whole, self._held(self.schedule.peak_pages(step_tokens)))

    def _held(self, pages: int) -> int:
        """Blocks of so many pages that were retired from in between."""
        if not self.schedule.evicts:
            return cdiv(pages, self.pages)
        window = pages - self.schedule.store_pages - self.schedule.moment_pages
        return self.rewritten + cdiv(window - 1, self.pages) + 1
