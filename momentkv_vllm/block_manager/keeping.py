"""When a request starts from the state of an evicted prefix, and when its own is kept."""

from dataclasses import dataclass, field
from itertools import takewhile

from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

from momentkv_vllm.block_manager.states import StateCache


@dataclass
class PrefixState:
    """Where a request that has pages stands with the prefix cache.

    step_end_tokens: tokens at the end of the step it was scheduled for last.
    request: known from the first step on.
    sealed: its pages that will be rewritten have left the cache, and none come in.
    keep: events ahead at which its state shall be kept, ascending.
    """

    step_end_tokens: int
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

    states: StateCache | None
    shares_exact_prompts: bool

    def share_prompts(self, alone: bool) -> None:
        """Keep states from now on, and pages of exact prompts, for a scheduler that looks them up.

        alone: all layers evict. Otherwise the others' pages of an exact prompt and of a longer one with the same beginning have
        one key and other numbers, so that neither is kept beyond the budget.
        """
        exact = self.schedule.exact_prompt_tokens > 0
        if not self.enable_caching or (exact and not alone):
            return
        self.shares_exact_prompts = exact
        if self.kv_cache_spec.has_states:
            states = StateCache(self.kv_cache_spec, self.block_pool, self.kv_cache_group_id)
            self.states = states if states.most_states else None

    def cacheable_tokens(self, request: Request) -> int:
        """Longest prefix that the request's pages may be shared of; 0 without prefix caching."""
        if not self.enable_caching:
            return 0
        first = self.schedule.first_event_of(request.num_prompt_tokens) if self.shares_exact_prompts else 0
        return self.kv_cache_spec.cacheable_before(max(first, self.schedule.first_event_tokens))

    def exact_prompt_hit(self, request: Request) -> list[KVCacheBlock]:
        """Cached pages of a prompt that is longer than the budget and attended exactly: those that stock vLLM would find, up to
        the queries before the prompt's end that the policy observes."""
        most = min(self.cacheable_tokens(request), request.num_tokens - 1) // self.block_size
        if most * self.block_size <= self.kv_cache_spec.cacheable_tokens:
            return []
        hashes = resolve_block_hashes(request.block_hashes, self.block_pool.hash_block_size, self.block_size)
        found = (self.block_pool.get_cached_block(name, [self.kv_cache_group_id]) for name in hashes[:most])
        return [pages[0] for pages in takewhile(bool, found)]

    def _begin(self, state: PrefixState, request: Request) -> None:
        """The first step of a request that was admitted."""
        state.request = request
        plan = self.states and self.states.plans.get(request)
        if plan:
            state.keep = list(plan.keep)
            self.states.remember(request, plan.known)
            start = plan.start if request.request_id in self.evicting else 0
            self.states.used(request, start)
            self.metrics.looked_up(start, plan.known)

    def forget_state(self, request_id: str) -> None:
        """The request's pages are not the state of its tokens: it leaves none."""
        state = self.prefixes.get(request_id)
        if state and state.sealed:
            state.request = None

    def _start_from_state(self, request_id: str, boundary: int) -> None:
        """The request goes on from hit pages that were a state: they become its own."""
        self.evicting[request_id] = boundary
        self.total_retired += boundary - self.rewritten_pages
        self.total_evicted += self.schedule.evicted_tokens(boundary)
        self.prefixes[request_id] = PrefixState(0, sealed=True)
        pages = self.req_to_blocks[request_id][: self.rewritten_pages]
        cached = [column for column, page in enumerate(pages) if page.block_hash is not None]
        if len(cached) <= self._spare_pages():
            for column in cached:
                self._make_private(request_id, column, pages[column])
        else:
            self.block_pool.evict_blocks({pages[column].block_id for column in cached})

    def _keep_state(self, state: PrefixState) -> None:
        """Keep the state that the request's pages hold before the coming step, if its plan says so."""
        request = state.request
        event = self.schedule.last_event(request.num_computed_tokens, request.num_prompt_tokens)
        planned = event in state.keep and self.states.covers(request, event)
        state.keep = [e for e in state.keep if e > event]
        row = self.req_to_blocks[request.request_id]
        if not planned or (not self.states.has(request, event) and self._spare_pages() < self.rewritten_pages):
            return
        self.states.hold_window(request, event, row)
        if not self.states.has(request, event):
            copies = self.block_pool.get_new_blocks(self.rewritten_pages)
            for page, copy in zip(row, copies, strict=False):
                self._copy_before_step(page, copy)
            self.states.hold(request, event, copies)
        self.metrics.states_held(self.states.count())

    def _leave_state(self, request: Request) -> None:
        """The request gives its pages back: they hold the state of its last event once the steps in flight are done."""
        event = self.schedule.last_event(request.num_computed_tokens, request.num_prompt_tokens)
        if not self.states or not self.states.covers(request, event):
            return
        row = self.req_to_blocks[request.request_id]
        self.states.remember(request, request.num_prompt_tokens)
        self.states.hold_window(request, event, row)
        if not self.states.has(request, event):
            self.states.hold(request, event, row[: self.rewritten_pages])
        self.metrics.states_held(self.states.count())
