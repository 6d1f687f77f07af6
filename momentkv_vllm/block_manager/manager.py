"""The scheduler's side: frees retired pages to vLLM's pool, bounds admission, keeps shared prefixes out of harm's way, counts."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from momentkv_vllm.block_manager.class_books import ClassBooks
from momentkv_vllm.block_manager.integrity import ChecksIntegrity
from momentkv_vllm.block_manager.keeping import KeepsStates, PrefixState
from momentkv_vllm.block_manager.metrics import PageMetrics
from momentkv_vllm.block_manager.startup import announce
from momentkv_vllm.budget_classes import class_number
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_schedule import PageSchedule


class MomentKVManager(ChecksIntegrity, KeepsStates, FullAttentionManager):
    """Block manager of a group of evicting layers (vllm/v1/core/single_type_kv_cache_manager.py).

    It frees columns [S+M, boundary) of a request once the tokens that made the worker retire them are settled; the
    worker, which runs the same schedule, retired them at the end of the step that computed those tokens. A page here is a
    block of vLLM's, which holds several of the schedule's in models whose other layers keep states (page_blocks.py).

    Prefix caching: the worker rewrites columns [0, S+M) from the first event on. Such a page must have a single owner, and must
    leave the prefix cache before it is rewritten. If the policy observes attention, all pages of the budget have a single
    owner, because observations are stored per page.

    * A hit page that somebody else owns is copied for the new request; one that nobody owns is taken as it is. So a hit
      never needs more free pages than the same request without one.
    * Before the step that reaches its first event a request is sealed: a copy of each of its cached pages takes their place
      in the cache. The copies ride on vLLM's own list, which the worker runs before that step.
    * Pages are cached a step after they were scheduled, because those copies run before the step's own stores; the pages of
      its last step when a request gives them back.
    """

    def __init__(self, kv_cache_spec: MomentKVSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.books = [ClassBooks.of(kv_cache_spec, number) for number in range(len(kv_cache_spec.schedules))]
        self.chosen: dict[str, int] = {}
        self.evicting: dict[str, int] = {}
        self.live_pages: dict[str, int] = {}
        self.prefixes: dict[str, PrefixState] = {}
        self._copied_from: dict[int, KVCacheBlock] = {}
        self.shares_exact_prompts = False
        self.metrics = PageMetrics(kv_cache_spec, self.block_pool.num_gpu_blocks - 1)
        announce(kv_cache_spec, self.block_pool.num_gpu_blocks - 1)

    @property
    def schedule(self) -> PageSchedule:
        """Of the default class."""
        return self.books[0].schedule

    def of(self, request_id: str) -> ClassBooks:
        """The books of a request's class; those of the default for one that nobody chose a class for."""
        return self.books[self.chosen.get(request_id, 0)]

    def choose(self, request: Request) -> None:
        """Note the class of a request that comes in, until `forget`."""
        settings = request.sampling_params
        number = class_number(self.kv_cache_spec.config.class_names, settings and settings.extra_args)
        if number:
            self.chosen[request.request_id] = number

    def usage(self, request: Request) -> dict[str, str | int]:
        """What a request that ends has held, before it gives back its pages: tokens in its pages, tokens in its moments (the last
        token that it sampled is in neither), and the pages themselves, as the pool knows them."""
        books = self.of(request.request_id)
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        boundary = books.schedule.boundary_column(computed, request.num_prompt_tokens)
        evicted = books.schedule.evicted_tokens(boundary)
        return {
            "kv_budget": books.served.name,
            "held_tokens": computed - evicted,
            "evicted_tokens": evicted,
            "held_pages": self.live_pages.get(request.request_id, 0),
        }

    def forget(self, request_id: str) -> None:
        """The request has ended and given back its pages."""
        self.chosen.pop(request_id, None)

    @classmethod
    def find_longest_cache_hit(cls, *, max_length: int, kv_cache_spec: MomentKVSpec, **kwargs):
        """As vLLM's, but never past what any request must compute itself for its first event; the scheduler knows of requests
        that may take more."""
        max_length = min(max_length, kv_cache_spec.cacheable_tokens)
        return super().find_longest_cache_hit(max_length=max_length, kv_cache_spec=kv_cache_spec, **kwargs)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> int:
        """As vLLM's, plus the pages for copies of hit pages that others own. Columns that were retired need no page."""
        books = self.of(request_id)
        self.max_admission_blocks_per_request = books.admission  # read by the call below
        hit = [b for b in new_computed_blocks if not b.is_null]
        num_tokens -= (len(new_computed_blocks) - len(hit)) * self.block_size
        pages = super().get_num_blocks_to_allocate(request_id, num_tokens, hit, *args, **kwargs)
        return pages + sum(b.ref_cnt > 0 for b in hit[: books.private])

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        *args,
        **kwargs,
    ) -> None:
        """Give a new request its hit pages; those that it must not share become its own."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, num_local_computed_tokens, *args, **kwargs)
        books = self.of(request_id)
        for column, block in enumerate(new_computed_blocks[: books.private]):
            if block.ref_cnt > 1 and not block.is_null:
                self._make_private(request_id, column, block)
        # Of an exact prompt there are as many pages as in stock vLLM; a state lacks those that were retired.
        if any(block.is_null for block in new_computed_blocks):
            self._start_from_state(request_id, books.schedule.boundary_column(num_local_computed_tokens))
        self._count_live(request_id, sum(not b.is_null for b in new_computed_blocks))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        state = self.prefixes.setdefault(request_id, PrefixState(0))
        state.step_end_tokens, state.before_step = num_tokens_main_model, True
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._count_live(request_id, len(blocks))
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """Cache the pages that earlier steps have filled, until the request's last chance before its first event; then the
        states of its plan."""
        state = self.prefixes[request.request_id]
        if state.request is None:
            self._begin(state, request)
        # vLLM also calls when a step's tokens are in (0.32 with async scheduling, 0.33 with drafts too). A copy then would
        # hold its source twice until the next step, which calls again.
        before_step, state.before_step = state.before_step, False
        if state.sealed:
            if before_step and state.keep and request.num_computed_tokens >= state.keep[0]:
                self._keep_state(state)
            return
        filled = min(num_tokens, request.num_computed_tokens, self.cacheable_tokens(request))
        super().cache_blocks(request, filled, *args, **kwargs)
        # `num_tokens` leaves out a token that is still in flight (async scheduling), the step does not.
        if state.step_end_tokens >= self.of(request.request_id).schedule.first_event_of(request.num_prompt_tokens):
            state.sealed = True
            self._seal(request.request_id)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the schedule has retired at `processed_computed_tokens` settled tokens."""
        books = self.of(request_id)
        boundary = books.schedule.boundary_column(processed_computed_tokens, num_prompt_tokens or 0)
        before = self.evicting.get(request_id, 0)
        # A request that was preempted starts again at zero; its pages were all freed.
        if boundary <= before or request_id not in self.req_to_blocks:
            return
        blocks = books.blocks
        first, last = blocks.retired(before) or blocks.rewritten, blocks.retired(boundary)
        self._remove_blocks_in_range(request_id, first, last)
        self.evicting[request_id] = boundary
        freed = last - first
        newly_evicted = books.schedule.evicted_tokens(boundary) - books.schedule.evicted_tokens(before)
        books.evicting += not before
        books.retired += freed
        books.evicted += newly_evicted
        self._count_live(request_id, -freed)
        self.metrics.retired(books.number, pages=freed, tokens=newly_evicted)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's, for a request that ends or is preempted. What its last step has filled is cached first."""
        state = self.prefixes.pop(request_id, None)
        if state and state.request and state.sealed:
            self._leave_state(state.request)
        elif state and state.request:
            self._cache_last_step(state.request)
        blocks = super().pop_blocks_for_free(request_id)
        books, boundary = self.of(request_id), self.evicting.pop(request_id, 0)
        books.evicting -= boundary > 0
        books.retired -= max(0, books.blocks.retired(boundary) - books.rewritten)
        books.evicted -= books.schedule.evicted_tokens(boundary)
        books.sequences -= request_id in self.live_pages
        books.live -= self.live_pages.pop(request_id, 0)
        self._publish()
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """No cascade attention: store pages are private."""
        return 0

    def _cache_last_step(self, request: Request) -> None:
        filled = min(request.num_tokens, request.num_computed_tokens, self.cacheable_tokens(request))
        super().cache_blocks(request, filled, replay_boundaries=())

    def _make_private(self, request_id: str, column: int, shared: KVCacheBlock) -> None:
        """Replace a shared hit page by a copy.

        Both ends of the copy stay referenced until vLLM has handed the list over (Scheduler._free_cow_retained_blocks).
        """
        (copy,) = self.block_pool.get_new_blocks(1)
        self.req_to_blocks[request_id][column] = copy
        self._copy_before_step(shared, copy)
        copy.ref_cnt += 1
        self.block_pool.free_blocks([shared])

    def _seal(self, request_id: str) -> None:
        """Take the request's pages that will be rewritten out of the prefix cache, leaving copies there."""
        cached = [
            b for b in self.req_to_blocks[request_id][: self.of(request_id).rewritten] if b.block_hash is not None
        ]
        copies = self.block_pool.get_new_blocks(min(self._spare_pages(), len(cached)))
        for page, copy in zip(cached, copies, strict=False):
            self.block_pool.move_block_hashes(page, copy)
            self._copy_before_step(page, copy)
        self.block_pool.evict_blocks({page.block_id for page in cached[len(copies) :]})

    def _spare_pages(self) -> int:
        """Free pages that this step's requests cannot need of this group: a copy must not be the reason for a preemption.
        Layers of other groups take a page or two of the same pool as well, which is not counted."""
        step_pages = self.kv_cache_spec.step_tokens // self.block_size + len(self.req_to_blocks)
        return max(0, self.block_pool.get_num_free_blocks() - step_pages)

    def _copy_before_step(self, source: KVCacheBlock, copy: KVCacheBlock) -> None:
        """Put a copy on the list that vLLM hands to the worker with the step (take_pending_cow_copies). The worker reads all
        sources first: one that is itself a copy of this step is read where its content comes from."""
        source = self._copied_from.get(source.block_id, source)
        source.ref_cnt += 1
        self._copied_from[copy.block_id] = source
        self._pending_cow_copies.append((source, copy))

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        self._copied_from.clear()
        return super().take_pending_cow_copies()

    def _count_live(self, request_id: str, change: int) -> None:
        if change:
            books = self.of(request_id)
            books.sequences += request_id not in self.live_pages
            books.live += change
            self.live_pages[request_id] = self.live_pages.get(request_id, 0) + change
            self._publish()

    def _publish(self) -> None:
        self.metrics.holdings(self.books)
