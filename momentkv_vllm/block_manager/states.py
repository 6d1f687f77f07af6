"""States of evicted prefixes in vLLM's prefix cache: where a later request over the same beginning goes on reading.

A state is what columns [0, S+M) hold right after the event at a token count. It depends on the tokens before and on nothing else,
so its pages can be cached like a block. (Where events are further apart in a prompt than after it, that is so in the prompt.)
Their keys: the hash of the block that ends at the event (it covers the prefix, LoRA, cache_salt and multimodal inputs), a
fingerprint of what shapes a state, and the column. The window's pages, from `boundary_column` to the event, have vLLM's own keys,
unless prompts that are attended exactly use these for other numbers. All of them lie in vLLM's hash table and free list: the
least recently used go first.

Idea of what to keep: Marconi (arXiv 2411.19379). No code of it is used.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.request import Request

from momentkv_vllm.kv_spec import MomentKVSpec

GAP_SHARE = 4
"""A state is kept while a prompt is read if it is a quarter of the budget from the one that the request started from."""

MAX_KNOWN = 1 << 16
"""Events of earlier texts that are remembered, by their hashes (some 10 MB)."""


@dataclass(frozen=True)
class ReadingPlan:
    """What a request that is admitted does with states.

    start: tokens that it takes from the prefix cache.
    known: the last event up to which an earlier request had the same tokens; 0 if there is none.
    keep: events at which its state shall be kept while it reads, ascending.
    """

    start: int
    known: int
    keep: tuple[int, ...]


class Found(NamedTuple):
    """What is known of a waiting request's text, and when: `changes` and tokens then. vLLM asks again at every step.

    held: no later event of it has a state. known: the last event up to which an earlier request had the same tokens; 0: none.
    """

    changes: int
    tokens: int
    held: int
    known: int


class StateCache:
    """States of one budget class of an engine.

    Attributes:
        held: pages of each state by the hash of the block that ends at its event, least recently used first. vLLM may have taken
            pages for something else since then: they have lost their key.
        known: hashes at the events of texts that were read, oldest first. Hints of where texts part, no content.
        plans: of requests that wait or run.
        changes: how often a state or a text came in.
    """

    def __init__(self, spec: MomentKVSpec, block_pool: BlockPool, group_id: int, number: int = 0) -> None:
        """number: of the class. Classes have equal shares of what states may fill."""
        config = spec.config.classes[number].config
        self.schedule, self.pool, self.group_id = spec.schedules[number], block_pool, group_id
        self.state_pages = self.schedule.store_pages + self.schedule.moment_pages
        share = (
            config.state_share
            if config.state_share == 1
            else config.state_share / sum(s.evicts for s in spec.schedules)
        )
        self.most_states = self.schedule.evicts * int(share * (block_pool.num_gpu_blocks - 1)) // self.state_pages
        self.interval_tokens = config.state_interval_tokens
        self.fingerprint = spec.state_fingerprint(config)
        self.held: dict[BlockHash, list[KVCacheBlock]] = {}
        self.known: dict[BlockHash, None] = {}
        self.plans: WeakKeyDictionary[Request, ReadingPlan] = WeakKeyDictionary()
        self.changes = 0
        self._found: WeakKeyDictionary[Request, Found] = WeakKeyDictionary()

    def hits(self, request: Request, after: int) -> Iterator[tuple[int, list[KVCacheBlock]]]:
        """Events after `after` that the request can start from, the latest first, with the row of pages up to there."""
        if not self.held or not self._evicts_at_fixed_counts(request):
            return
        for event, name in self._events(request, self._find(request).held, after):
            pages = self._pages(name)
            window = self._window(request, event) if pages else None
            if window is not None:
                retired = self.schedule.boundary_column(event) - self.state_pages
                yield event, [*pages, *[self.pool.null_block] * retired, *window]

    def plan(self, request: Request, start: int) -> None:
        """Decide what the request keeps while it reads on from `start`; nothing if its text is below the budget."""
        if request.num_tokens <= self.schedule.first_event_tokens or not self._evicts_at_fixed_counts(request):
            return
        end, known = request.num_tokens - 1, self._find(request).known
        self.plans[request] = ReadingPlan(
            start, known, tuple(sorted(self._worth_keeping(start, known, end, self._last_event(request))))
        )

    def _find(self, request: Request) -> Found:
        found = self._found.get(request)
        if found is None or found[:2] != (self.changes, request.num_tokens):
            end = request.num_tokens - 1
            held, known = (
                next((event for event, name in self._events(request, end) if name in names), 0)
                for names in (self.held, self.known)
            )
            found = self._found[request] = Found(self.changes, request.num_tokens, held, known)
        return found

    def _worth_keeping(self, start: int, known: int, end: int, last: Callable[[int], int]) -> set[int]:
        """Where texts parted before, otherwise a place near the prompt's end that lies before a question of usual length; and
        what the user asked for."""
        gap = self.schedule.first_event_tokens // GAP_SHARE
        step = self.interval_tokens or end + 1
        keep = {event for event in map(last, range(step, end + 1, step)) if event > start}
        if known > start:
            keep.add(known)
        near_end = (event for event in (last(end - gap), last(end)) if event and event - max(start, known) >= gap)
        return keep | set(islice(near_end, 1))

    def has(self, request: Request, event: int) -> bool:
        """Whether the state at that event of the request's text is held."""
        return self._pages(self._name(request, event)) is not None

    def covers(self, request: Request, event: int) -> bool:
        """Whether the request has a state there whose key is known: that of its tokens."""
        if not self._evicts_at_fixed_counts(request):
            return False
        known = min(request.num_tokens, len(self._hashes(request)) * self.schedule.page_size)
        return 0 < event <= known and event == self._last_event(request)(event)

    def hold(self, request: Request, event: int, pages: Sequence[KVCacheBlock]) -> None:
        """Cache `pages`, which have no key, as the request's state at that event; over the bound the oldest state leaves."""
        name = self._name(request, event)
        self._drop(name)
        for column, page in enumerate(pages):
            self.insert(page, self._key(name, column), event)
        self.held[name] = list(pages)
        self.changes += 1
        while len(self.held) > self.most_states:
            self._drop(next(iter(self.held)))

    def hold_window(self, request: Request, event: int, row: Sequence[KVCacheBlock]) -> None:
        """Cache the exact pages that a request at the state of that event reads; `row`: the request's pages."""
        for column, key in self.window_keys(request, event):
            cached = self._cached(key)
            if cached and not cached.ref_cnt and cached is not row[column]:
                # The same content, but the one that was used longer ago.
                self.pool.evict_blocks({cached.block_id})
            if row[column].block_hash is None and not self._cached(key):
                self.insert(row[column], key, (column + 1) * self.schedule.page_size)

    def window_keys(self, request: Request, event: int) -> Iterator[tuple[int, BlockHashWithGroupId]]:
        """Columns of a state's window pages, and their keys. Beyond the first event, a token of an exact prompt attends to more
        than the same token of a longer prompt does."""
        hashes, size, first = self._hashes(request), self.schedule.page_size, self.schedule.first_event_tokens
        for column in range(self.schedule.boundary_column(event), event // size):
            apart = self.schedule.exact_prompt_tokens and column * size >= first
            name = BlockHash(hashes[column] + self.fingerprint) if apart else hashes[column]
            yield column, make_block_hash_with_group_id(name, self.group_id)

    def insert(self, page: KVCacheBlock, key: BlockHashWithGroupId, tokens: int) -> None:
        """Put a page without a key, which holds the last of `tokens` tokens, into vLLM's hash table."""
        page.set_block_hash(key, num_tokens=tokens)
        self.pool.cached_block_hash_to_block.insert(key, page)

    def used(self, request: Request, event: int) -> None:
        """Make the state at that event the most recently used one; 0: none."""
        name = self._name(request, event) if event else None
        if name in self.held:
            self.held[name] = self.held.pop(name)

    def remember(self, request: Request, after: int = 0, end: int | None = None) -> None:
        """Note the events of the request's text in (after, end]; None: to its end."""
        for _, name in self._events(request, request.num_tokens if end is None else end, after):
            self.changes += name not in self.known
            self.known[name] = None
        while len(self.known) > MAX_KNOWN:
            del self.known[next(iter(self.known))]

    def count(self) -> int:
        """States held. One that lost pages is counted until older ones are gone."""
        while self.held and self._pages(next(iter(self.held))) is None:
            pass
        return len(self.held)

    def check_integrity(self, owned: set[int]) -> None:
        """Assert that no request owns a state's page, in the `owned` pages' numbers."""
        for name in list(self.held):
            for page in self._pages(name) or ():
                assert page.block_id not in owned, f"page {page.block_id} is a state's and a request's"
                assert self.pool.cached_block_hash_to_block.contain(page.block_hash, page.block_id)
        assert len(self.held) <= self.most_states, f"{len(self.held)} states, {self.most_states} are allowed"

    def _evicts_at_fixed_counts(self, request: Request) -> bool:
        """An exact prompt longer than the budget moves the first event to its end, and what is left depends on where that was:
        such a request leaves no state and starts from none."""
        return self.schedule.first_event_of(request.num_prompt_tokens) == self.schedule.first_event_tokens

    def _hashes(self, request: Request) -> Sequence[BlockHash]:
        """Of the request's full pages."""
        return resolve_block_hashes(request.block_hashes, self.pool.hash_block_size, self.schedule.page_size)

    def _last_event(self, request: Request) -> Callable[[int], int]:
        """The request's latest event, at or before a token count, whose state may be another text's."""
        return partial(self.schedule.last_common_event, prompt_tokens=request.num_prompt_tokens)

    def _events(self, request: Request, end: int, after: int = 0) -> Iterator[tuple[int, BlockHash]]:
        """Such events in (after, end] and the hashes of the blocks that end there, the latest first."""
        schedule, size, hashes = self.schedule, self.schedule.page_size, self._hashes(request)
        last = self._last_event(request)(min(end, len(hashes) * size))
        for event in range(last, max(schedule.first_event_tokens - 1, after), -schedule.prefill_retire_tokens):
            yield event, hashes[event // size - 1]

    def _name(self, request: Request, event: int) -> BlockHash:
        return self._hashes(request)[event // self.schedule.page_size - 1]

    def _key(self, name: BlockHash, column: int) -> BlockHashWithGroupId:
        state = BlockHash(name + self.fingerprint + column.to_bytes(4, "big"))
        return make_block_hash_with_group_id(state, self.group_id)

    def _pages(self, name: BlockHash) -> list[KVCacheBlock] | None:
        """A held state's pages, if vLLM has left it all of them."""
        pages = self.held.get(name)
        if pages and any(page.block_hash != self._key(name, column) for column, page in enumerate(pages)):
            self._drop(name)
            return None
        return pages

    def _window(self, request: Request, event: int) -> list[KVCacheBlock] | None:
        window = [self._cached(key) for _, key in self.window_keys(request, event)]
        return None if None in window else window

    def _cached(self, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        return self.pool.cached_block_hash_to_block.get_one_block(key)

    def _drop(self, name: BlockHash) -> None:
        pages = self.held.pop(name, ())
        left = {page.block_id for column, page in enumerate(pages) if page.block_hash == self._key(name, column)}
        self.pool.evict_blocks(left)
