"""When a request starts from the state of an evicted prefix, and when its own is kept."""

from dataclasses import dataclass, field
from itertools import takewhile

from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

from momentkv_vllm.block_manager.class_books import ClassBooks
from momentkv_vllm.block_manager.states import StateCache


@dataclass
class PrefixState:
    """Where a request that has pages stands with the prefix cache.

    step_end_tokens: tokens at the end of the step it was scheduled for last.
    before_step: pages were allocated for a step since vLLM last said what is filled.
    request: known from the first step on.
    sealed: its pages that will be rewritten have left the cache, and none come in.
    keep: events ahead at which its state shall be kept, ascending.
    """

    step_end_tokens: int
    before_step: bool = False
    request: Request | None = None
    sealed: bool = False
    keep: list[int] = field(default_factory=list)


class KeepsStates:
    """For the block manager (manager.py), whose fields it reads; with a scheduler that looks states up.

    * A request that starts from a state gets copies of its pages, or, where free pages are few, the pages themselves. Neither
      needs more free pages than reading everything.
    * While it reads, copies of its pages are kept before the step that would leave an event of its plan behind.
    * A request that ends or is preempted leaves its own pages as the state of its last event.
    """

    books: list[ClassBooks]
    shares_exact_prompts: bool

    def share_prompts(self, alone: bool) -> None:
        """Keep states from now on, and pages of exact prompts, for a scheduler that looks them up.

        alone: all layers evict. Otherwise the others' pages of an exact prompt and of a longer one with the same beginning have
        one key and other numbers, so that neither is kept beyond the budget.
        """
        exact = any(books.schedule.exact_prompt_tokens > 0 for books in self.books)
        if not self.enable_caching or (exact and not alone):
            return
        self.shares_exact_prompts = exact
        if self.kv_cache_spec.has_states:
            for books in self.books:
                states = StateCache(self.kv_cache_spec, self.block_pool, self.kv_cache_group_id, books.number)
                books.states = states if states.most_states else None

    def cacheable_tokens(self, request: Request) -> int:
        """Longest prefix that the request's pages may be shared of; 0 without prefix caching."""
        if not self.enable_caching:
            return 0
        schedule = self.of(request.request_id).schedule
        first = schedule.first_event_of(request.num_prompt_tokens) if self.shares_exact_prompts else 0
        return self.kv_cache_spec.cacheable_before(max(first, schedule.first_event_tokens))

    def longer_hit(self, request: Request) -> list[KVCacheBlock]:
        """Cached pages of a request that may take more than any other may: its class has a larger budget, or its prompt is longer
        than the budget and attended exactly. Those that stock vLLM would find, up to the queries before the first event that
        the policy observes."""
        most = min(self.cacheable_tokens(request), request.num_tokens - 1) // self.block_size
        if most * self.block_size <= self.kv_cache_spec.cacheable_tokens:
            return []
        hashes = resolve_block_hashes(request.block_hashes, self.block_pool.hash_block_size, self.block_size)
        found = (self.block_pool.get_cached_block(name, [self.kv_cache_group_id]) for name in hashes[:most])
        return [pages[0] for pages in takewhile(bool, found)]

    def _begin(self, state: PrefixState, request: Request) -> None:
        """The first step of a request that was admitted."""
        state.request = request
        states = self.of(request.request_id).states
        plan = states and states.plans.get(request)
        if plan:
            state.keep = list(plan.keep)
            states.remember(request, plan.known)
            start = plan.start if request.request_id in self.evicting else 0
            states.used(request, start)
            self.metrics.looked_up(start, plan.known)

    def forget_state(self, request_id: str) -> None:
        """The request's pages are not the state of its tokens: it leaves none."""
        state = self.prefixes.get(request_id)
        if state and state.sealed:
            state.request = None

    def _start_from_state(self, request_id: str, boundary: int) -> None:
        """The request goes on from hit pages that were a state: they become its own."""
        books = self.of(request_id)
        self.evicting[request_id] = boundary
        books.evicting += 1
        books.retired += boundary - books.rewritten
        books.evicted += books.schedule.evicted_tokens(boundary)
        self.prefixes[request_id] = PrefixState(0, sealed=True)
        pages = self.req_to_blocks[request_id][: books.rewritten]
        cached = [column for column, page in enumerate(pages) if page.block_hash is not None]
        if len(cached) <= self._spare_pages():
            for column in cached:
                self._make_private(request_id, column, pages[column])
        else:
            self.block_pool.evict_blocks({pages[column].block_id for column in cached})

    def _keep_state(self, state: PrefixState) -> None:
        """Keep the state that the request's pages hold before the coming step, if its plan says so."""
        request, books = state.request, self.of(state.request.request_id)
        states = books.states
        event = books.schedule.last_event(request.num_computed_tokens, request.num_prompt_tokens)
        planned = event in state.keep and states.covers(request, event)
        state.keep = [e for e in state.keep if e > event]
        row = self.req_to_blocks[request.request_id]
        if not planned or (not states.has(request, event) and self._spare_pages() < books.rewritten):
            return
        states.hold_window(request, event, row)
        if not states.has(request, event):
            copies = self.block_pool.get_new_blocks(books.rewritten)
            for page, copy in zip(row, copies, strict=False):
                self._copy_before_step(page, copy)
            states.hold(request, event, copies)
        self.metrics.states_held(self.states_held())

    def _leave_state(self, request: Request) -> None:
        """The request gives its pages back: they hold the state of its last event once the steps in flight are done."""
        books = self.of(request.request_id)
        states = books.states
        event = books.schedule.last_event(request.num_computed_tokens, request.num_prompt_tokens)
        if not states or not states.covers(request, event):
            return
        row = self.req_to_blocks[request.request_id]
        states.remember(request, request.num_prompt_tokens)
        states.hold_window(request, event, row)
        if not states.has(request, event):
            states.hold(request, event, row[: books.rewritten])
        self.metrics.states_held(self.states_held())

    def states_held(self) -> int:
        """Of all classes."""
        return sum(books.states.count() for books in self.books if books.states)
