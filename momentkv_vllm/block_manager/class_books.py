"""The books of one budget class: its page schedule, its states, and sums over its requests."""

import sys
from dataclasses import dataclass

from momentkv_vllm.block_manager.states import StateCache
from momentkv_vllm.config import BudgetClass
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule


@dataclass
class ClassBooks:
    """Of one engine. Sums are kept, so that counting costs the same for one sequence and for a thousand.

    number, served: its place among the classes, and what they were declared as.
    private: columns before this one have a single owner. Observed attention is kept by page, so what is observed is not shared.
    admission: bounds the blocks that a waiting request must find free; None: its prompt may need them all.
    live, retired: pages that its sequences own, and gave back. evicted: tokens.
    sequences, evicting: how many own pages, and how many of these evict.
    states: None if none are kept.
    """

    number: int
    served: BudgetClass
    schedule: PageSchedule
    blocks: PageBlocks
    private: int
    admission: int | None
    live: int = 0
    retired: int = 0
    evicted: int = 0
    sequences: int = 0
    evicting: int = 0
    states: StateCache | None = None

    @classmethod
    def of(cls, spec: MomentKVSpec, number: int) -> "ClassBooks":
        served, schedule = spec.config.classes[number], spec.schedules[number]
        blocks = spec.blocks_of(schedule)
        observed = spec.observes_attention and schedule.evicts
        # With eviction a request never holds its whole prompt.
        bounded = schedule.exact_prompt_tokens < ANY_PROMPT
        return cls(
            number,
            served,
            schedule,
            blocks,
            private=sys.maxsize if observed else blocks.rewritten,
            admission=blocks.least_pool(spec.step_tokens) if bounded else None,
        )

    @property
    def rewritten(self) -> int:
        """Columns before this one are rewritten once a request evicts: S+M, or the blocks that hold these pages."""
        return self.blocks.rewritten
