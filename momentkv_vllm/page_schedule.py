"""Which pages a sequence holds: a pure function of how many of its tokens are committed.

Scheduler and worker both call this file and never exchange a message. Nothing here depends on how the tokens were cut
into chunks or batches, so a sequence ends in the same state however it was scheduled, preempted or recomputed.

A block-table row by column, once the sequence evicts (column j = logical page j):

    [ 0 .. S )     store pages     retained tokens, rewritten in place, every KV head its own tokens
    [ S .. S+M )   moment pages    the running moments, one record per KV head
    [ S+M .. b )   retired         really freed to vLLM's pool
    [ b .. end )   window pages    the newest tokens, exact, in order

Eviction events happen at fixed token counts: first when the budget is full (`first_event_tokens`), then every `retire_tokens`,
or every `prefill_retire_tokens` while a prompt is read; at its end one more event catches up with the finer grain. The event at
count e retires every page before `boundary_column(e)`.
"""

from dataclasses import dataclass, replace

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.event_counts import EventCounts
from momentkv_vllm.refuse import refuse

DEFAULT_RETIRE_SHARE = 32
"""An event retires budget / 32: 6 to 8 % of decode attention over an int4 store at 1,024 tokens (make bench NAME=store)."""

EXACT_PROMPT_BUDGETS = 4
"""Prompts up to so many budgets are attended exactly with prefill "auto"."""
ANY_PROMPT = 1 << 62
"""As `exact_prompt_tokens`."""
NO_EVENT = 1 << 62
"""A token count that no sequence reaches."""


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


@dataclass(frozen=True)
class PageSchedule(EventCounts):
    """Page arithmetic of one configuration.

    Attributes:
        page_size: tokens a page.
        store_pages, moment_pages, window_pages: S, M, W above; S + M + W = `budget_pages`.
        retire_pages: pages leaving the window at an event (the window shrinks by so many, then grows again).
        prefill_retire_pages: likewise while a prompt is read, a multiple of `retire_pages`; 0: as many.
        store_page_tokens: tokens of a store page; more than `page_size` where the store is quantised, 0 for `page_size`.
        record_in_store: the moment record lies at the end of the last store page and needs no pages of its own;
            `record_tokens`: slots that this takes from the store.
        run_tokens: neighbours that stay or leave together.
        equal_tokens: until so many have left the window, every head holds them all; more than that, and some have evicted.
            0: heads always hold as many.
        exact_prompt_tokens: longest prompt that is attended exactly, all of its events deferred to its end; 0: none
            ("chunked" prefill), ANY_PROMPT: all ("full").
        evicts: False: the budget is as large as the longest sequence, which never reaches it.
    """

    page_size: int
    store_pages: int
    moment_pages: int
    window_pages: int
    retire_pages: int = 1
    exact_prompt_tokens: int = 0
    store_page_tokens: int = 0
    record_in_store: bool = False
    record_tokens: int = 0
    run_tokens: int = 1
    prefill_retire_pages: int = 0
    equal_tokens: int = 0
    evicts: bool = True

    def keeping_all(self, most_tokens: int) -> "PageSchedule":
        """The schedule of sequences of at most `most_tokens` that keep every token: all is window."""
        window = max(1, cdiv(most_tokens, self.page_size) - self.store_pages - self.moment_pages)
        return replace(self, window_pages=window, exact_prompt_tokens=0, prefill_retire_pages=0, evicts=False)

    @property
    def budget_pages(self) -> int:
        return self.store_pages + self.moment_pages + self.window_pages

    @property
    def store_tokens(self) -> int:
        """Tokens that the store holds when it is full."""
        slots = self.store_pages * (self.store_page_tokens or self.page_size) - self.record_tokens
        return slots // self.run_tokens * self.run_tokens

    @property
    def held_tokens(self) -> int:
        """Tokens, of one head, that a sequence holds at its budget."""
        return self.store_tokens + self.window_pages * self.page_size

    def stored_tokens(self, boundary: int) -> int:
        """Tokens in the store once every column before `boundary` is retired: all of them until it is full."""
        return min(self.store_tokens, boundary * self.page_size)

    @property
    def record_pages(self) -> slice:
        """Columns of the pages that hold the moment record, if there is one."""
        if self.record_in_store:
            return slice(self.store_pages - 1, self.store_pages)
        return slice(self.store_pages, self.store_pages + self.moment_pages)

    @property
    def is_packed(self) -> bool:
        """Whether the store is quantised."""
        return self.store_page_tokens > 0

    @property
    def retire_tokens(self) -> int:
        return self.retire_pages * self.page_size

    @property
    def prefill_retire_tokens(self) -> int:
        return max(self.prefill_retire_pages, self.retire_pages) * self.page_size

    @property
    def first_event_tokens(self) -> int:
        """Committed tokens at which the budget is full: below it the run is stock attention."""
        return self.budget_pages * self.page_size if self.evicts else NO_EVENT

    @property
    def first_retired_tokens(self) -> int:
        """Tokens that a sequence's first event takes, with those in the pages of the store; 0: it depends on its prompt."""
        first = self.boundary_column(self.first_event_tokens)
        return 0 if self.exact_prompt_tokens else first * self.page_size

    def boundary_column(self, committed_tokens: int, prompt_tokens: int = 0) -> int:
        """First column still exact once `committed_tokens` are in; 0 while nothing was ever evicted.

        `prompt_tokens` matters where `reads_prompt_lengths` says so.
        """
        event = self.last_event(committed_tokens, prompt_tokens)
        if event == 0:
            return 0
        events_after_first = (event - self.first_event_tokens) // self.retire_tokens
        return self.store_pages + self.moment_pages + (events_after_first + 1) * self.retire_pages

    def evicted_tokens(self, boundary_column: int) -> int:
        """n: tokens in the moments once every column before `boundary_column` is retired; the same for every head, or the mean
        over heads with budgets of their own."""
        return max(0, boundary_column * self.page_size - self.store_tokens)

    def competes(self, boundary_column: int) -> bool:
        """Whether any head has evicted by then: until its store is full nobody competes."""
        return boundary_column * self.page_size > (self.equal_tokens or self.store_tokens)

    def retained_pages(self, committed_tokens: int, boundary_column: int) -> int:
        """Store + window pages that attention reads after `committed_tokens`."""
        pages = cdiv(committed_tokens, self.page_size)
        return pages if boundary_column == 0 else self.store_pages + pages - boundary_column

    def peak_pages(self, step_tokens: int) -> int:
        """Most pages a sequence can own when at most `step_tokens` of its tokens are scheduled and not yet settled."""
        return self.reading_pages + cdiv(max(0, step_tokens - 1), self.page_size)

    @property
    def reading_pages(self) -> int:
        """Most pages a sequence can own between two steps while its prompt is read; afterwards `budget_pages`."""
        return self.budget_pages + max(0, self.prefill_retire_pages - self.retire_pages)

    @property
    def most_retired_pages(self) -> int:
        """Most pages that an event retires where no prompt is exact; a first event retires the moment pages too."""
        return max(self.moment_pages + self.retire_pages, self.prefill_retire_pages)

    def least_pool_pages(self, step_tokens: int) -> int:
        """Pages that a pool must have for one sequence; in "full" prefill a prompt may need more, as in stock vLLM."""
        if not self.evicts or self.exact_prompt_tokens >= ANY_PROMPT:
            return self.budget_pages
        return max(self.peak_pages(step_tokens), self._exact_prompt_pages(step_tokens))

    def what_needs_pages(self, step_tokens: int) -> str:
        """What takes those pages beyond the budget, in words."""
        if self.exact_prompt_tokens < ANY_PROMPT and self._exact_prompt_pages(step_tokens) > self.peak_pages(
            step_tokens
        ):
            return f"a prompt of exact_prompt_tokens={self.exact_prompt_tokens}"
        step = f"a prefill step of {step_tokens} tokens"
        if self.reading_pages == self.budget_pages:
            return step
        return f"{step} and prefill_retire_tokens={self.prefill_retire_tokens}"

    def _exact_prompt_pages(self, step_tokens: int) -> int:
        # The step that ends an exact prompt may be followed by others before it settles.
        return cdiv(self.exact_prompt_tokens + step_tokens - 1, self.page_size) if self.exact_prompt_tokens else 0


def build_schedule(
    config: EvictionConfig, page_size: int, moment_pages: int, keeps_only_sinks: bool, store_page_tokens: int = 0,
    record_tokens: int | None = None,
) -> PageSchedule:  # fmt: skip
    """Lay out the budget. Raises ValueError with the smallest legal budget when it does not fit.

    Args:
        config: the user's settings.
        page_size: tokens a page (vLLM: block_size).
        moment_pages: pages that the moment records of a sequence need (page_layout.py), 0 for none.
        store_page_tokens: of a quantised store, as in `PageSchedule`.
        record_tokens: likewise; None: the record does not lie in the store.
        keeps_only_sinks: the policy never keeps a retired token besides the sinks: all else is window (StreamingLLM).
    """
    # Scoring reads every key of the budget: retiring a fixed share of it keeps that cost a fixed share of decode attention.
    share = config.budget_tokens // DEFAULT_RETIRE_SHARE
    retire_pages = max(1, cdiv(share if config.retire_tokens is None else config.retire_tokens, page_size))
    least_window = 1 if config.window_tokens is None else config.window_tokens
    window_pages = cdiv(least_window, page_size) + retire_pages
    least_store = max(1, cdiv(config.sink_tokens + (not keeps_only_sinks), page_size))
    least_pages = least_store + moment_pages + window_pages
    budget_pages = config.budget_tokens // page_size
    if budget_pages < least_pages:
        refuse(
            f"kv_eviction.budget_tokens={config.budget_tokens} is too small: with pages of {page_size} tokens the least "
            f"is {least_pages * page_size} (store {least_store} + moments {moment_pages} + window {window_pages} pages "
            f"for window_tokens={config.window_tokens or AUTO}, retire_tokens={retire_pages * page_size})",
            "raise --kv-budget",
            "lower window_tokens",
            "use a smaller --block-size",
            "take correction 'zeroth' or 'off' for a smaller state",
        )
    if keeps_only_sinks:
        window_pages = budget_pages - least_store - moment_pages
    elif config.window_tokens is None:
        wanted = _auto_window_pages(budget_pages, retire_pages, packed=store_page_tokens > 0)
        window_pages = max(window_pages, min(wanted, budget_pages - least_store - moment_pages))
    return PageSchedule(
        page_size=page_size,
        store_pages=budget_pages - moment_pages - window_pages,
        moment_pages=moment_pages,
        window_pages=window_pages,
        retire_pages=retire_pages,
        exact_prompt_tokens=_exact_prompt_tokens(config),
        store_page_tokens=store_page_tokens,
        record_in_store=record_tokens is not None,
        record_tokens=record_tokens or 0,
        run_tokens=config.run_tokens or 1,
        prefill_retire_pages=retire_pages * cdiv(config.prefill_retire_tokens or 1, retire_pages * page_size),
    )


def _exact_prompt_tokens(config: EvictionConfig) -> int:
    if config.prefill != "auto":
        return ANY_PROMPT if config.prefill == "full" else 0
    return config.exact_prompt_tokens or EXACT_PROMPT_BUDGETS * config.budget_tokens


def _auto_window_pages(budget_pages: int, retire_pages: int, packed: bool) -> int:
    """Exact pages at a full budget. A quantised store holds several tokens in the place of an exact one, so it gets more."""
    return cdiv(budget_pages, 16) + retire_pages if packed else budget_pages // 2
