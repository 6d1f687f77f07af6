"""Turns vLLM's step metadata into work lists: who attends what, and who retires which pages afterwards.

A step gives every request some new tokens, [start, end). Eviction events that fall inside cut them into segments: all
queries of a segment see the same store and moments. Round r handles the r-th segment of every request, so a decode step
is one round, and the result never depends on how the scheduler cut the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, Round
from momentkv_vllm.page_schedule import PageSchedule, cdiv
from momentkv_vllm.policies import Policy

MAX_SLOTS_PER_WORK = 1 << 16
"""Retained slots that one work list may name: bounds the float32 copies of the reference kernels
(2 * 4 * num_kv_heads * head_dim bytes a slot: 512 MiB at 8 heads of 128)."""

MAX_QUERIES, MAX_EXACT_QUERIES = 512, 128
"""Queries of one segment, and of one in a prompt that is exact or of unknown length (0): bounds the logits of the
reference kernels (queries x heads x context)."""

NEVER = 1 << 62
"""A position that no token has."""


@dataclass(frozen=True)
class Segment:
    """Consecutive new tokens of one request that see the same store and moments.

    row:             the request's row in the batch.
    first_token:     index of its first token in the flat token list.
    start, end:      token positions [start, end).
    boundary_column: first exact column while the segment attends.
    retire_to:       boundary column after the event at `end`, 0 if there is none.
    observe_from:    position of the first query whose attention is observed for the coming event.
    observe_only:    the row is below its budget and attended by vLLM's kernel.
    schedule:        of the row's budget class, by number.
    """

    row: int
    first_token: int
    start: int
    end: int
    boundary_column: int
    retire_to: int
    observe_from: int
    observe_only: bool = False
    schedule: int = 0


@dataclass
class StepPlan:
    """What a step does beyond stock attention.

    stock_rows: rows still below their budget, served by vLLM's own kernel.
    rounds: the rest.
    shared: `rounds` as layers that share a cache run them (sharing.py); None if no layers of the model do.
    """

    stock_rows: list[int]
    rounds: list[Round]
    shared: Any = None


class StepPlanner:
    """Builds `StepPlan`; pure index arithmetic on the CPU, no model data.

    schedules: of the budget classes, the default's first.
    most_slots: as MAX_SLOTS_PER_WORK.
    retired_pages: 0, or the width of every retire list: rows that retire in a round are one list then, padded. A kernel that
        is compiled by widths is compiled once, and launched once a round.
    prompts: rows with several new tokens are ours below their budget, too (KernelFamily.attends_prompts).
    """

    def __init__(
        self,
        schedules: Sequence[PageSchedule],
        config: EvictionConfig,
        policy: type[Policy],
        most_slots: int = MAX_SLOTS_PER_WORK,
        retired_pages: int = 0,
        prompts: bool = False,
    ) -> None:
        self.schedules = schedules
        self.most_slots, self.retired_pages, self.prompts = most_slots, retired_pages, prompts
        self.config = config
        self.observe = policy.observes is not None
        self.observe_all = policy.observes_every_query()

    def build(
        self,
        query_start: list[int],
        seq_lens: list[int],
        prompt_lens: list[int],
        block_table: torch.Tensor,
        classes: Sequence[int] = (),
        committed: Sequence[int] | None = None,
    ) -> StepPlan:
        """Plan one step, or one pass of a drafter.

        Args:
            query_start: [num_requests + 1] start of each request in the flat token list.
            seq_lens: [num_requests] tokens at the end of the step.
            prompt_lens: [num_requests] prompt lengths; read where the schedule `reads_prompt_lengths`.
            block_table: [num_requests, columns] page numbers.
            classes: number of each request's budget class; rows beyond have the default.
            committed: [num_requests] tokens of which evictions may take notice, by default all. Those beyond attend and no more.
        """
        table = block_table.numpy()
        stock_rows: list[int] = []
        rounds: list[list[Segment]] = []
        for row, end in enumerate(seq_lens):
            first_token = query_start[row]
            start = end - (query_start[row + 1] - first_token)
            number = classes[row] if row < len(classes) else 0
            known = end if committed is None else committed[row]
            segments = list(self._segments(row, first_token, start, end, prompt_lens[row], number, known))
            ours = self.prompts and end - start > 1
            if not ours and all(s.boundary_column == 0 and s.retire_to == 0 for s in segments):
                # Nothing evicted, nothing to evict: vLLM's own kernel, bit for bit.
                stock_rows.append(row)
                segments = [self._only_observed(s) for s in segments if s.observe_from < s.end]
            for number, segment in enumerate(segments):
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append(segment)
        return self._plan(stock_rows, rounds, table)

    def _plan(self, stock_rows: list[int], segments: list[list[Segment]], table: np.ndarray) -> StepPlan:
        """segments: of each round."""
        return StepPlan(stock_rows, [Round(self._attends(s, table), self._retires(s, table)) for s in segments])

    @staticmethod
    def _only_observed(s: Segment) -> Segment:
        """The queries of a stock segment whose attention the coming event needs; their output is vLLM's."""
        start = max(s.start, s.observe_from)
        return replace(s, first_token=s.first_token + start - s.start, start=start, observe_only=True)

    def _segments(
        self, row: int, first_token: int, start: int, end: int, prompt: int, number: int, committed: int = NEVER
    ) -> Iterator[Segment]:
        schedule = self.schedules[number]
        events = set(schedule.events(start, min(end, committed), prompt))
        most = MAX_EXACT_QUERIES if prompt <= schedule.exact_prompt_tokens else MAX_QUERIES
        first_cut = start + most - (start - schedule.first_event_tokens) % most
        position = start
        cuts = events | {end} | set(range(first_cut, end, most))
        if start < committed < end and self._observe_from(schedule, committed - 1, prompt) < end:
            cuts.add(committed)
        for stop in sorted(cuts):
            yield Segment(
                row=row,
                first_token=first_token + position - start,
                start=position,
                end=stop,
                boundary_column=schedule.boundary_column(min(position, committed), prompt),
                retire_to=schedule.boundary_column(stop, prompt) if stop in events else 0,
                observe_from=self._observe_from(schedule, position, prompt) if position < committed else NEVER,
                schedule=number,
            )
            position = stop

    def _observe_from(self, schedule: PageSchedule, position: int, prompt: int) -> int:
        """First observed position before the next event; NEVER when nothing is observed."""
        if not self.observe or not schedule.evicts:
            return NEVER
        if self.observe_all:
            return 0
        event = schedule.next_event(position, prompt)
        if not schedule.competes(schedule.boundary_column(event, prompt)):
            return NEVER  # a quantised store still has room: nobody competes
        return max(event - self.config.observation_tokens, schedule.last_event(position, prompt))

    def _attends(self, segments: list[Segment], table: np.ndarray) -> list[AttendWork]:
        # Decode rows would pay for the padding of chunks beside them: they get a list of their own. A list has one schedule.
        groups: dict[tuple[int, bool, bool], list[Segment]] = {}
        for s in segments:
            groups.setdefault((s.schedule, s.observe_only, s.end - s.start > 1), []).append(s)
        return [_asked(self._attend(part, table)) for group in groups.values() for part in self._split(group)]

    def _retires(self, segments: list[Segment], table: np.ndarray) -> list[RetireWork]:
        # A first event retires more pages than later ones: grouping by their number avoids padding.
        due: dict[tuple[int, int], list[Segment]] = {}
        for s in segments:
            if s.retire_to:
                width = self.retired_pages or s.retire_to - self._retire_from(s)
                due.setdefault((s.schedule, width), []).append(s)
        return [self._retire(due[key], table) for key in sorted(due)]

    def _split(self, segments: list[Segment]) -> Iterator[list[Segment]]:
        """Parts of at most `most_slots` gathered slots."""
        schedule = self.schedules[segments[0].schedule]
        slots = max(schedule.retained_pages(s.end, s.boundary_column) for s in segments) * schedule.page_size
        size = max(1, self.most_slots // slots)
        for i in range(0, len(segments), size):
            yield segments[i : i + size]

    def _attend(self, segments: list[Segment], table: np.ndarray) -> AttendWork:
        schedule = self.schedules[segments[0].schedule]
        num_pages = max(schedule.retained_pages(s.end, s.boundary_column) for s in segments)
        n = len(segments)
        pages = np.zeros((n, num_pages), np.int64)
        for i, s in enumerate(segments):
            columns = self._retained_columns(s)
            pages[i, : len(columns)] = table[s.row, columns]
        start = _column(segments, "start")
        queries = _column(segments, "end") - start
        boundary = _column(segments, "boundary_column")
        exact_from = boundary if schedule.is_packed else np.where(boundary > 0, boundary - schedule.store_pages, 0)
        observe_from = restart = None
        if self.observe:
            zone = _column(segments, "observe_from")
            observe_from = torch.from_numpy(np.clip(zone - start, 0, queries))
            restart = torch.from_numpy((start <= zone) & (zone < start + queries))
        return AttendWork(
            first_token=torch.from_numpy(_column(segments, "first_token")),
            num_queries=torch.from_numpy(queries),
            pages=torch.from_numpy(pages),
            last_slot=torch.from_numpy(start - exact_from * schedule.page_size),
            moment_pages=self._moment_pages(segments, table),
            num_evicted=self._count(segments),
            observe_from=observe_from,
            restart=restart,
            observe_only=segments[0].observe_only,
            most_queries=int(queries.max()),
            only_chunks=bool(queries.min() > 1),
            stored=self._stored(segments),
            store_pages=schedule.store_pages,
            budget_class=segments[0].schedule,
        )

    def _retire(self, segments: list[Segment], table: np.ndarray) -> RetireWork:
        rows, schedule = [s.row for s in segments], self.schedules[segments[0].schedule]
        pages = [table[s.row, self._retire_from(s) : s.retire_to] for s in segments]
        retiring = np.full((len(rows), self.retired_pages or len(pages[0])), -1, np.int64)
        for row, found in zip(retiring, pages, strict=True):
            row[: len(found)] = found
        return RetireWork(
            store_pages=torch.from_numpy(table[rows, : schedule.store_pages].astype(np.int64)),
            retiring_pages=torch.from_numpy(retiring),
            moment_pages=self._moment_pages(segments, table),
            num_evicted=self._count(segments),
            run_tokens=schedule.run_tokens,
            stored=self._stored(segments),
            store_tokens=schedule.store_tokens,
            first_tokens=schedule.first_retired_tokens,
            evicts=any(schedule.competes(s.retire_to) for s in segments),
            budget_class=segments[0].schedule,
        )

    def _retained_columns(self, s: Segment) -> list[int]:
        schedule = self.schedules[s.schedule]
        end = cdiv(s.end, schedule.page_size)
        if s.boundary_column == 0:
            return list(range(end))
        return [*range(schedule.store_pages), *range(s.boundary_column, end)]

    def _retire_from(self, s: Segment) -> int:
        return s.boundary_column or self.schedules[s.schedule].store_pages

    def _moment_pages(self, segments: list[Segment], table: np.ndarray) -> torch.Tensor:
        columns = self.schedules[segments[0].schedule].record_pages
        return torch.from_numpy(np.ascontiguousarray(table[[s.row for s in segments], columns], np.int64))

    def _stored(self, segments: list[Segment]) -> torch.Tensor | None:
        """Tokens in quantised stores."""
        schedule = self.schedules[segments[0].schedule]
        if not schedule.is_packed:
            return None
        return torch.tensor([schedule.stored_tokens(s.boundary_column) for s in segments])

    def _count(self, segments: list[Segment]) -> torch.Tensor:
        schedule = self.schedules[segments[0].schedule]
        return torch.tensor([schedule.evicted_tokens(s.boundary_column) for s in segments], dtype=torch.float32)


def _asked(work: AttendWork) -> AttendWork:
    """The same, but where none of the queries is observed no policy asks: nothing is launched for that.

    It is apart from `_attend`: the device makes that one's lists, too (step_plan_on_device.py), and cannot leave any out.
    """
    if work.observe_from is None or bool((work.observe_from < work.num_queries).any()):
        return work
    return replace(work, observe_from=None, restart=None)


def _column(segments: list[Segment], name: str) -> np.ndarray:
    return np.array([getattr(s, name) for s in segments], np.int64)
