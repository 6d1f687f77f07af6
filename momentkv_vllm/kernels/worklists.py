"""What a kernel call works on: plain index tensors, built once a step and shared by all layers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def fresh_pages(slots: Tensor, page_size: int) -> Tensor:
    """Pages whose first slot is among `slots` [tokens] (page * page_size + slot; negative = padding)."""
    return slots[(slots >= 0) & (slots % page_size == 0)] // page_size


def mapped(work: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of a work list, its tensors replaced by change(name, tensor)."""
    return replace(work, **{name: change(name, x) for name, x in vars(work).items() if isinstance(x, Tensor)})


@dataclass
class AttendWork:
    """Consecutive queries of some rows against the pages that each row retains.

    first_token:  [rows] int64 index of a row's first query in the step's flat token list; its others follow.
    num_queries:  [rows] int64 number of queries, at least 1.
    pages:        [rows, n] int64, store pages then window pages in order; padded with the null page 0.
    last_slot:    [rows] int64, last slot of `pages` that the first query sees; every next query sees one more (causality
                  of the shortened sequence). Where a row has a quantised store, slots are counted from its first window page.
    moment_pages: [rows, M] int64.
    num_evicted:  [rows] float32, n of the moments; 0 = no record.
    observe_from: [rows] int64, first query (0 = the row's first) whose attention the policy wants; None: no policy asks.
    restart:      [rows] bool, the observation before the row's next event begins in this work list; None likewise.
    observe_only: the rows are below their budget: only their attention is wanted, their output is vLLM's.
    stored:       [rows] int64 tokens in the row's quantised store, its first `store_pages` pages; 0: all its pages are exact.
                  None: no store is quantised.
    store_pages:  see there.
    weights:      [rows, num_kv_heads, observed queries of KV heads, n] float32, which one layer's attend may leave to its
                  observe; made by a family that does, at the first layer of a step.
    most_queries: the largest of `num_queries` where the host knows it, else 0: on a GPU, asking it waits for the device.
    only_chunks:  the host knows that every row has several queries.
    budget_class: number of the rows' budget class.
    """

    first_token: Tensor
    num_queries: Tensor
    pages: Tensor
    last_slot: Tensor
    moment_pages: Tensor
    num_evicted: Tensor
    observe_from: Tensor | None = None
    restart: Tensor | None = None
    observe_only: bool = False
    most_queries: int = 0
    only_chunks: bool = False
    stored: Tensor | None = None
    store_pages: int = 0
    weights: Tensor | None = None
    budget_class: int = 0

    def arguments(self) -> list[Tensor | None]:
        """The tensors that operators in C++ and CUDA take, in their order."""
        rows = [self.first_token, self.num_queries, self.pages, self.last_slot, self.moment_pages, self.num_evicted]
        return [*rows, self.observe_from, self.restart]

    def query_bound(self) -> int:
        """No row has more queries. Waits for the device unless `most_queries` is given."""
        return self.most_queries or int(self.num_queries.max())

    @cached_property
    def most_observed(self) -> int:
        """No row has more observed queries. Waits for the device unless every row has one query."""
        return 1 if self.most_queries == 1 else int((self.num_queries - self.observe_from).max().clamp(min=0))

    def tokens(self) -> Tensor:
        """[queries of all rows] int64 flat token indices."""
        ends = self.num_queries.cumsum(0)
        inside = torch.arange(int(ends[-1]), device=ends.device) - (ends - self.num_queries).repeat_interleave(
            self.num_queries
        )
        return self.first_token.repeat_interleave(self.num_queries) + inside


@dataclass
class LayersOf:
    """Layers that share a step's work lists, all of one shape, for an operation on all of them.

    caches, observed: of each (kernels/cache_view.py, kernels/observed.py).
    offsets:          [layers, 5] int64 on their device, bytes from the first layer's cache, observations, places and capacity of
                      heads, and feedback (kernels/cache_view.py) to each layer's; of what there is none, 0.
    """

    caches: list[Any]
    observed: list[Any]
    offsets: Tensor


@dataclass
class RetireWork:
    """Rows whose eviction event is due.

    store_pages:    [rows, S] int64.
    retiring_pages: [rows, K] int64 pages leaving the window, in order; -1 pads rows that retire fewer.
    moment_pages:   [rows, M] int64; at a row's first event some of the retiring pages themselves.
    num_evicted:    [rows] float32, n before the event.
    run_tokens:     neighbours that stay or leave together.
    stored:         [rows] int64 tokens in a quantised store before the event; 0: its pages are still exact. None: no store is
                    quantised, all are full from the first event on.
    store_tokens:   tokens that a quantised store holds when it is full.
    first_tokens:   that a row's first event takes, those in the pages of the store among them; 0: nobody knows.
    evicts:         some row evicts; else there is room for all, and no score is asked for.
    due:            [1 + rows] int64, how many rows retire a page, and their numbers in order; None: nobody counted.
    budget_class:   number of the rows' budget class.
    """

    store_pages: Tensor
    retiring_pages: Tensor
    moment_pages: Tensor
    num_evicted: Tensor
    run_tokens: int = 1
    stored: Tensor | None = None
    store_tokens: int = 0
    first_tokens: int = 0
    evicts: bool = True
    due: Tensor | None = None
    budget_class: int = 0

    def capacity(self, page_size: int) -> int:
        """Tokens that a store holds when it is full."""
        return self.store_pages.shape[1] * page_size if self.stored is None else self.store_tokens

    def arguments(self) -> list[Tensor | None]:
        """The tensors that operators in C++ and CUDA take, in their order."""
        return [self.store_pages, self.retiring_pages, self.moment_pages, self.num_evicted]


@dataclass
class Round:
    """Work lists that run together: first all attend (`attends`), then those with an event retire (`retires`)."""

    attends: list[AttendWork] = field(default_factory=list)
    retires: list[RetireWork] = field(default_factory=list)


@dataclass
class Rounds:
    """Rounds of one layer, one after the other.

    caches:     the layer's cache as a budget class sees it, by its number.
    correction: how the evicted mass is added back, as the setting has it.
    """

    rounds: list[Round]
    caches: Callable[[int], Any]
    correction: str

    @property
    def corrected(self) -> bool:
        return self.correction != "off"

    @cached_property
    def attends(self) -> list[AttendWork]:
        return [work for r in self.rounds for work in r.attends]

    @cached_property
    def retires(self) -> list[RetireWork]:
        return [work for r in self.rounds for work in r.retires]

    @property
    def observes(self) -> bool:
        return any(work.observe_from is not None for work in self.attends)

    def attended(self, budget_class: int) -> Any:
        """The cache as attention reads it."""
        return self.caches(budget_class).corrected_by(self.correction)
