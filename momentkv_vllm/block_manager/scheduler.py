"""vLLM's schedulers with what the page schedule adds: boundaries for a step's tokens, requests that start from the state of an
evicted prefix, and sessions whose prompt grows.

Chosen through vLLM's own option `scheduler_cls`, unless the user has set it.
"""

from weakref import WeakSet

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, StreamingUpdate

from momentkv_vllm.block_manager.manager import MomentKVManager
from momentkv_vllm.block_manager.startup import refuse_pool_without_states
from momentkv_vllm.budget_classes import KV_BUDGET, KV_USAGE, USAGE_FIELD
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.model_layers import sharing_layers
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.refuse import refuse


class StopsAtEvents:
    """Shortens what vLLM would schedule of a request; at least one token is left.

    * A step that would reach a request's first event stops at the end of the cacheable prefix. The manager caches pages one step
      after they were filled, and the step that reaches the first event rewrites them: without the stop, a prompt whose first
      chunk is longer than the budget would leave nothing in the prefix cache. Prompts below it are scheduled as vLLM does.
    * A step that reads past two events stops at the first of them if the request shall keep its state there (states.py).
    * A step stops at the first event if all of its tokens are asked for and some layers share a cache: they attend to what stands
      at the end of a step (attention/sharing.py).
    * Draft tokens stop before the tokens that the next event depends on: a page is retired for good, and what a policy has
      observed stays observed, so these steps have one token and no drafts.
    """

    caches_are_shared = False
    """Whether some layers read the cache of others."""

    def bind(self, evicting: MomentKVManager) -> None:
        """Take over what the block manager and its spec say."""
        self.evicting = evicting
        self.unshared_tokens = evicting.kv_cache_spec.unshared_tokens

    def _schedule_of(self, request: Request) -> PageSchedule:
        return self.evicting.of(request.request_id).schedule

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on how many tokens of a request a step computes: [num_computed_tokens, + num_new_tokens)."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if self.caches_are_shared and request.sampling_params.prompt_logprobs is not None:
            event = self._schedule_of(request).next_event(num_computed_tokens, request.num_prompt_tokens)
            tokens = min(tokens, event - num_computed_tokens)
        if num_computed_tokens < request.num_tokens - 1:  # it reads known tokens, without drafts
            uncached = self.evicting.cacheable_tokens(request) - num_computed_tokens
            first_event = self._schedule_of(request).first_event_of(request.num_prompt_tokens)
            reaches_event = num_computed_tokens + tokens >= first_event
            if uncached > 0 and reaches_event:
                return min(tokens, uncached)
            return self._until_kept_state(request, num_computed_tokens, tokens)
        if tokens <= 1:
            return tokens
        return min(tokens, max(1, self._draft_end(request, num_computed_tokens) - num_computed_tokens))

    def _draft_end(self, request: Request, committed: int) -> int:
        """The count at which drafts must end: before what the next event depends on, the event itself where nobody competes."""
        schedule, prompt = self._schedule_of(request), request.num_prompt_tokens
        event = schedule.next_event(committed, prompt)
        competes = schedule.competes(schedule.boundary_column(event, prompt))
        return event - (self.unshared_tokens if competes else 1)

    def _until_kept_state(self, request: Request, start: int, tokens: int) -> int:
        """Such that a step's end comes before the next event after one at which the state shall be kept."""
        books = self.evicting.of(request.request_id)
        plan = books.states and books.states.plans.get(request)
        keep = next((event for event in plan.keep if event > start), None) if plan else None
        reads_past = keep and books.schedule.next_event(keep, request.num_prompt_tokens) <= start + tokens
        return keep - start if reads_past else tokens


class StartsFromStates(StopsAtEvents):
    """A request whose text is longer than the budget starts from the latest state of its beginning, if one is cached; one whose
    prompt is attended exactly, from its pages, as in stock vLLM. vLLM's own lookup knows no classes and ends before any request's
    first event; what a request may take beyond is found here."""

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """max_cache_hit_length: vLLM 0.33's, for which it must have more than KV; then a hit is what vLLM finds. None: no cap."""
        capped = () if max_cache_hit_length is None else (max_cache_hit_length,)
        hit = super()._get_local_prefix_cache_hit(request, *capped)
        if capped or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return hit
        row, states = self.evicting.longer_hit(request), self.evicting.of(request.request_id).states
        tokens = len(row) * self.evicting.block_size
        groups = tokens > hit[1] and self._rows_of_all_groups(request, tokens, row)
        if groups:
            hit = KVCacheBlocks(groups), tokens, 0, False
        if states is None:
            return hit
        for event, row in states.hits(request, after=hit[1]):
            groups = self._rows_of_all_groups(request, event, row)
            if groups:
                hit = KVCacheBlocks(groups), event, 0, False
                break
        states.plan(request, start=hit[1])
        return hit

    def _rows_of_all_groups(
        self, request: Request, tokens: int, row: list[KVCacheBlock]
    ) -> tuple[list[KVCacheBlock], ...] | None:
        """`row` beside what layers with a window need at `tokens`; None if that is not cached."""
        coordinator, groups = self.kv_cache_manager.coordinator, []
        for manager in coordinator.single_type_managers:
            if manager is self.evicting:
                groups.append(row)
                continue
            (blocks,), length = manager.find_longest_cache_hit(
                block_hashes=request.block_hashes,
                max_length=tokens,
                kv_cache_group_ids=[manager.kv_cache_group_id],
                block_pool=manager.block_pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=False,
                alignment_tokens=coordinator.scheduler_block_size,
            )
            if length != tokens:
                return None
            groups.append(blocks)
        return tuple(groups)


class RestartsSessions(StartsFromStates):
    """Sessions whose prompt arrives in pieces (vLLM's `resumable` requests) keep their pages from one piece to the next.

    That is right as long as the worker's state is what the schedule says of the longer prompt. Where it is not, the session is
    read again from its first token, as a preempted request is:

    * The session has evicted where one request over the same text would not have: its shorter prompt was exact, or it ended, so
      that events came in the finer grain.
    * A step in flight, whose token vLLM discards, has already reached what the next event depends on (async scheduling).
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        spec, cache = _evicting_spec(self.kv_cache_config), self.kv_cache_manager
        managers = cache.coordinator.single_type_managers
        (evicting,) = (m for m in managers if isinstance(m, MomentKVManager))
        refuse_pool_without_states(spec, cache.block_pool.num_gpu_blocks - 1, len(managers) - 1, cache.enable_caching)
        evicting.share_prompts(alone=len(managers) == 1)
        self.bind(evicting)
        self.caches_are_shared = bool(sharing_layers(self.vllm_config.model_config))
        self.overtaken: WeakSet[Request] = WeakSet()

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self.evicting.choose(request)
        super().add_request(request)

    def _free_request(self, request: Request, *args, **kwargs) -> tuple[dict | None, dict | None]:
        said = {USAGE_FIELD: self.evicting.usage(request)} if _asks_for_usage(request) else None
        of_connector, *others = super()._free_request(request, *args, **kwargs)
        return said or of_connector, *others

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.evicting.forget(request.request_id)

    def _handle_stopped_request(self, request: Request) -> bool:
        settled = request.num_computed_tokens - request.num_output_placeholders
        event = self._schedule_of(request).next_event(settled, request.num_prompt_tokens)
        if settled < request.num_computed_tokens and event - self.unshared_tokens < request.num_computed_tokens:
            self.overtaken.add(request)
        return super()._handle_stopped_request(request)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        before = self._past_events(session)
        _keep_class(session, update)
        super()._update_request_as_session(session, update)
        if self._past_events(session) != before or session in self.overtaken:
            self.overtaken.discard(session)
            self._read_again(session)

    def _past_events(self, session: Request) -> list[int]:
        """All that its prompt's length has decided so far."""
        schedule, prompt = self._schedule_of(session), session.num_prompt_tokens
        return list(schedule.events(0, session.num_computed_tokens, prompt)) if schedule.reads_prompt_lengths else []

    def _read_again(self, session: Request) -> None:
        """Give back what the session holds; vLLM then schedules it like a new request. Its pages are no state of its text."""
        self.evicting.forget_state(session.request_id)
        self._free_request_blocks(session)
        self.encoder_cache_manager.free(session)
        waits_with_pages = session in self.kv_holding_waiting
        session.num_computed_tokens = 0
        if waits_with_pages:
            self.kv_holding_waiting.remove_request(session)
            self.waiting.add_request(session)


def _asks_for_usage(request: Request) -> bool:
    settings = request.sampling_params
    return bool(settings and settings.extra_args and settings.extra_args.get(KV_USAGE))


def _keep_class(session: Request, update: StreamingUpdate) -> None:
    """A session keeps the class of its first piece, whose pages it has, whatever a later one says; workers read the later one."""
    first, later = session.sampling_params.extra_args or {}, update.sampling_params.extra_args or {}
    kept = {key: value for key, value in first.items() if key == KV_BUDGET}
    if later.get(KV_BUDGET) != first.get(KV_BUDGET):
        update.sampling_params.extra_args = {k: v for k, v in later.items() if k != KV_BUDGET} | kept


def _evicting_spec(kv_cache_config: KVCacheConfig) -> MomentKVSpec:
    """The spec of the one group of layers that evict. Models with windows or states have other groups beside it; vLLM
    makes several of it if most layers evict, which the metrics' one set of books cannot tell apart."""
    specs = [g.kv_cache_spec for g in kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, MomentKVSpec)]
    if len(specs) != 1:
        refuse(
            f"--kv-eviction: vLLM makes {len(specs)} KV cache groups of this model's full-attention layers, supported is 1 "
            f"(fewer than 1.5 times as many full-attention layers as other layers with a cache)"
        )
    return specs[0]


class MomentKVScheduler(RestartsSessions, Scheduler):
    """For --no-async-scheduling."""


class AsyncMomentKVScheduler(RestartsSessions, AsyncScheduler):
    """For --async-scheduling."""
