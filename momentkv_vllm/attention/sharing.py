"""Layers that read the cache of an earlier one, their target (Gemma 3n, Gemma 4 E2B and E4B): they attend and nothing else.

The last event of a step waits until the last of them has attended: until then the target keeps the pages that the event takes,
and nobody else writes to them. Events before it cannot wait: the target's later tokens need them. Tokens before such an event
get no attention in these layers (zeros): nothing reads it, because no later layer has a cache of its own, and a step samples
from a request's last tokens only. Where all tokens are asked for (prompt_logprobs), the scheduler ends steps at events.

Their attention is not observed: of a prompt it would be that of a step's last tokens, and what stays would depend on the steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from momentkv_vllm.attention.step_plan import Segment, StepPlan, StepPlanner
from momentkv_vllm.kernels.worklists import Round


@dataclass
class SharedRounds:
    """What a target and the layers that read its cache do, in place of `StepPlan.rounds`.

    target: all but the last event of each row.
    readers: the tokens after the last event but that one, unobserved.
    last_reader: these, and then the last events.
    """

    target: list[Round]
    readers: list[Round]
    last_reader: list[Round]


class SharingPlanner(StepPlanner):
    """For a model some of whose layers share a cache."""

    def _plan(self, stock_rows: list[int], segments: list[list[Segment]], table: np.ndarray) -> StepPlan:
        plan = super()._plan(stock_rows, segments, table)
        ours = [s for part in segments for s in part if not s.observe_only]
        last = {s.row: s for s in ours}
        early = [[s for s in part if s is not last.get(s.row)] for part in segments]
        read = [replace(s, observe_from=s.end) for s in ours if s.boundary_column == last[s.row].boundary_column]
        attends = [replace(work, observe_from=None, restart=None) for work in self._attends(read, table)]
        plan.shared = SharedRounds(
            target=[Round(r.attends, self._retires(s, table)) for r, s in zip(plan.rounds, early, strict=True)],
            readers=[Round(attends)],
            last_reader=[Round(attends, self._retires(list(last.values()), table))],
        )
        return plan


class SharedCache:
    """One layer's place among those that share its cache.

    layer: an `EvictingImpl` (layer.py), as `target`, the one that owns the cache (given as None: the layer itself).
    last_reader: of a target, the last layer built that reads its cache, which is the last that runs; None: nobody else does.
    """

    def __init__(self, layer: Any, target: Any) -> None:
        self.layer, self.target = layer, target or layer
        self.last_reader: Any = None
        if target is not None:
            target.shared.last_reader = layer

    @property
    def only_reads(self) -> bool:
        return self.target is not self.layer

    def rounds(self, step: StepPlan) -> list[Round]:
        """What this layer does in a step."""
        last = self.target.shared.last_reader
        if last is None:
            return step.rounds
        if not self.only_reads:
            return step.shared.target
        return step.shared.last_reader if last is self.layer else step.shared.readers
