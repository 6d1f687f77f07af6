"""A brute-force model of who owns which page: vLLM's real block manager with ours in it, a random scheduler, and a worker that
moves symbols instead of tensors and checks every page it reads.

A slot holds what its KV would depend on: the hash of the tokens up to its position and the events before it. A store or moment
page holds the prefix that was folded into it, likewise. Pages are never cleared.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache

from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from momentkv_vllm.block_manager.scheduler import StartsFromStates
from momentkv_vllm.budget_classes import salted
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule, cdiv

MAX_TOKENS = 64


def cheap_hash(value) -> bytes:
    return hash(value).to_bytes(8, "little", signed=True)


class NoLimit:
    """In place of vLLM's scheduler below our mixin."""

    def _reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens):
        return num_new_tokens

    def _get_local_prefix_cache_hit(self, request):
        return *self.kv_cache_manager.get_computed_blocks(request), False


class Stops(StartsFromStates, NoLimit):
    def __init__(self, spec: MomentKVSpec, kv: KVCacheManager) -> None:
        self.kv_cache_manager = kv
        (evicting,) = kv.coordinator.single_type_managers
        evicting.share_prompts(alone=True)
        self.bind(evicting)


@dataclass
class Sequence:
    """A request, the page schedule of its class, its prefix hashes, and how it was preempted and aborted."""

    request: Request
    plan: PageSchedule
    prefix: list[int] = field(default_factory=list)
    aborted: bool = False
    stale: int = 0

    def hash(self, position: int) -> int:
        while len(self.prefix) <= position:
            before = self.prefix[-1] if self.prefix else 0
            self.prefix.append(hash((before, self.request.all_token_ids[len(self.prefix)])))
        return self.prefix[position]

    def sample(self) -> None:
        """The next token: a function of all tokens before it, from a small alphabet."""
        self.request.append_output_token_ids(self.hash(self.request.num_tokens - 1) % 3)

    @property
    def done(self) -> bool:
        return self.request.num_tokens >= self.request.num_prompt_tokens + self.request.max_tokens


@dataclass
class Work:
    """A sequence's part of a step: positions [start, end), the last `drafts` of them uncertain."""

    sequence: Sequence
    start: int
    end: int
    drafts: int
    samples: bool
    table: list[int]


@cache
def events_until(plan: PageSchedule, position: int, prompt: int) -> tuple[int, ...]:
    return tuple(plan.events(0, position, prompt))


class Worker:
    def __init__(self, page_size: int, pages: int) -> None:
        self.page_size = page_size
        self.pages = [[None] * page_size for _ in range(pages)]

    def execute(self, works: list[Work], copies: list) -> None:
        for (_, to), content in zip(copies, [list(self.pages[source]) for source, _ in copies]):
            self.pages[to] = content
        for w in works:
            for position in range(w.start, w.end):
                slot = self.slot(w, position) if position < w.end - w.drafts else "draft"
                self.write(w, position, slot)
        for w in works:
            self.walk(w)

    def write(self, w: Work, position: int, slot) -> None:
        column, place = divmod(position, self.page_size)
        self.pages[w.table[column]][place] = slot

    def slot(self, w: Work, position: int):
        plan = w.sequence.plan
        events = events_until(plan, position, w.sequence.request.num_prompt_tokens)
        return (w.sequence.hash(position), events, plan) if events else w.sequence.hash(position)

    def state(self, w: Work, event: int, column: int) -> list:
        """A store or moment page after the event at that token count."""
        plan = w.sequence.plan
        events = events_until(plan, event, w.sequence.request.num_prompt_tokens)
        return [("state", w.sequence.hash(event - 1), column, events, plan)] * self.page_size

    def walk(self, w: Work) -> None:
        prompt, certain, plan = w.sequence.request.num_prompt_tokens, w.end - w.drafts, w.sequence.plan
        events = list(plan.events(w.start, w.end, prompt))
        assert not events or events[-1] <= certain, "an event depends on draft tokens"
        position = w.start
        for stop in [*events, certain] if certain not in events else events:
            self.read(w, position, stop)
            if stop in events:
                for column in range(plan.store_pages + plan.moment_pages):
                    self.pages[w.table[column]] = self.state(w, stop, column)
            position = stop

    def read(self, w: Work, position: int, end: int) -> None:
        plan, prompt = w.sequence.plan, w.sequence.request.num_prompt_tokens
        boundary = plan.boundary_column(position, prompt)
        if boundary:
            event = plan.last_event(position, prompt)
            for column in range(plan.store_pages + plan.moment_pages):
                assert self.pages[w.table[column]] == self.state(w, event, column), f"column {column}: another's state"
        for column in range(boundary, cdiv(end, plan.page_size)):
            first = column * plan.page_size
            want = [self.slot(w, p) for p in range(first, min(end, first + plan.page_size))]
            assert self.pages[w.table[column]][: len(want)] == want, f"column {column}: not this sequence's tokens"


class Simulation:
    """One random schedule: lengths, chunks, arrivals, aborts, preemptions, prefix hits, drafts, steps in flight.

    pages: those of a block, as in models whose other layers keep states."""

    def __init__(self, seed: int, pages: int = 1) -> None:
        self.rng, self.pages = random.Random(seed), pages
        rng = self.rng
        retire, size = rng.randint(1, 2), rng.choice([2, 3, 4] if pages == 1 else [2, 4])
        plan = PageSchedule(
            size,
            rng.randint(1, 3),
            rng.randint(0, 2),
            retire + rng.randint(1, 2),
            retire,
            rng.choice([0, 0, 0, rng.randint(0, MAX_TOKENS), ANY_PROMPT]),
            prefill_retire_pages=retire * rng.choice([0, 0, 2, 3]),
        )
        plans = self.plans = self.classes(plan, random.Random(f"classes {seed}"))
        self.chunk, self.lag = rng.choice([1, 3, 8, 20]), rng.choice([0, 0, 1])
        self.drafts = 0 if self.lag or size == 2 else rng.choice([0, size - 2])
        step_tokens = (self.chunk + self.drafts) * (1 + self.lag)
        spec = MomentKVSpec(
            block_size=size * pages, num_kv_heads=1, head_size=8, dtype=None, schedules=plans, step_tokens=step_tokens,
            config=EvictionConfig(
                rng.choice(["momentkv", "keydiff"]), budgets=self.budgets(), observation_tokens=rng.randint(1, 8),
                state_share=rng.choice([0.1, 0.5, 1.0]), state_interval_tokens=rng.choice([0, 0, 7]),
            ),
            model_name="", engine=0, splits_blocks=pages > 1,
        )  # fmt: skip
        assert spec.schedules == plans
        whole = cdiv(MAX_TOKENS + step_tokens, size * pages)
        peak = max(spec.blocks_of(each).least_pool(step_tokens) for each in plans)
        least = whole if any(each.exact_prompt_tokens or not each.evicts for each in plans) else peak
        config = KVCacheConfig(least + rng.choice([rng.randint(1, 20), 60]), [], [KVCacheGroupSpec(["layer"], spec)])
        self.kv = KVCacheManager(config, 4096, size * pages, size * pages, max_in_flight_tokens=step_tokens)
        self.manager, self.stops = self.kv.coordinator.single_type_managers[0], Stops(spec, self.kv)
        self.worker = Worker(size, config.num_blocks * pages)
        self.hasher = get_request_block_hasher(size * pages, cheap_hash)
        self.waiting = deque(self.sequence(f"r{i}") for i in range(rng.randint(2, 6)))
        self.total = list(self.waiting)
        self.running: list[Sequence] = []
        self.in_flight: deque = deque()
        self.hits = self.preemptions = 0

    def sequence(self, name: str) -> Sequence:
        """Prompts share one of two beginnings, so that prefixes hit at every length."""
        shared = [self.rng.choice([3, 4])] * self.rng.randint(0, 24)
        prompt = shared + [self.rng.randrange(3) for _ in range(self.rng.randint(1, 16))]
        return self.asks(name, prompt)

    def asks(self, name: str, prompt: list[int]) -> Sequence:
        names = [str(number) for number in range(len(self.plans))]
        number = self.class_rng.randrange(len(names))
        settings = SamplingParams(max_tokens=self.rng.randint(1, 20), extra_args={"kv_budget": names[number]})
        salt = salted(None, names, number)
        request = Request(name, prompt, settings, None, cache_salt=salt, block_hasher=self.hasher)
        self.manager.choose(request)
        return Sequence(request, self.plans[number])

    def classes(self, plan: PageSchedule, rng: random.Random) -> tuple[PageSchedule, ...]:
        """The first with `plan`, up to two others, of which one may keep all."""
        self.class_rng, found = rng, [plan]
        for _ in range(rng.choice([0, 0, 1, 2])):
            retire = rng.randint(1, 2)
            other = replace(
                plan,
                store_pages=rng.randint(1, 4),
                window_pages=retire + rng.randint(1, 4),
                retire_pages=retire,
                prefill_retire_pages=retire * rng.choice([0, 2]),
            )
            found.append(plan.keeping_all(MAX_TOKENS) if rng.random() < 0.3 else other)
        return tuple(found)

    def budgets(self) -> dict[str, int | str]:
        return {
            str(number): plan.first_event_tokens if plan.evicts else "off" for number, plan in enumerate(self.plans)
        }

    def goes_on(self, s: Sequence) -> None:
        """Sometimes somebody goes on from a text that ended, or from a place in it."""
        text = list(s.request.all_token_ids)
        if len(self.total) < 12 and self.rng.random() < 0.6:
            prompt = text[: self.rng.randint(1 + min(len(text), 34) // 2, 1 + min(len(text), 34))]
            prompt += [self.rng.randrange(3) for _ in range(self.rng.randint(0, 6))]
            self.waiting.append(self.asks(f"r{len(self.total)}", prompt))
            self.total.append(self.waiting[-1])

    @property
    def alive(self) -> bool:
        return any(not s.done and not s.aborted for s in self.total)

    def run(self) -> None:
        while self.alive:
            if self.running and self.rng.random() < 0.03:
                s = self.rng.choice(self.running)
                self.drop(s, abort=True)
                self.goes_on(s)
            before = self.preemptions
            works = self.schedule()
            copies, retained = self.kv.take_kv_cache_block_copies()
            self.kv.block_pool.free_blocks(retained)
            self.manager.check_integrity(requests={s.request.request_id: s.request for s in self.running})
            idle = self.alive and not works and not self.in_flight and self.preemptions == before
            assert not idle, "deadlock: nothing runs and nothing can be admitted"
            self.in_flight.append((works, copies))
            if len(self.in_flight) > self.lag or not works:
                self.finish_step()
        while self.in_flight:
            self.finish_step()
        assert self.kv.block_pool.get_num_free_blocks() == self.kv.block_pool.num_gpu_blocks - 1

    def schedule(self) -> list[Work]:
        works: dict[str, Work] = {}
        preempted = False
        for s in list(self.running):
            if s not in self.running:
                continue
            r = s.request
            if r.num_tokens + r.num_output_placeholders >= r.num_prompt_tokens + r.max_tokens + bool(self.lag):
                continue
            left = r.num_tokens + r.num_output_placeholders - r.num_computed_tokens
            drafts = self.rng.randint(0, self.drafts) if left == 1 else 0
            tokens = self.stops._reserve_prefill_lookahead(r, r.num_computed_tokens, min(left, self.chunk) + drafts)
            while s in self.running and self.kv.allocate_slots(r, tokens) is None:
                preempted = True
                works.pop(self.running[-1].request.request_id, None)
                self.drop(self.running[-1])
            if s in self.running:
                works[r.request_id] = self.work(s, tokens, tokens - 1 if left == 1 else 0)
        while self.waiting and not preempted:
            s = self.waiting[0]
            if s.stale or not self.admit(s, works):
                break
        for w in works.values():
            r = w.sequence.request
            r.num_computed_tokens += w.end - w.start
            r.num_in_flight_tokens += w.end - w.start
            r.num_output_placeholders += w.samples and self.lag
        return list(works.values())

    def admit(self, s: Sequence, works: dict[str, Work]) -> bool:
        r = s.request
        blocks, hit, _, _ = self.stops._get_local_prefix_cache_hit(r)
        tokens = self.stops._reserve_prefill_lookahead(r, hit, min(r.num_tokens - hit, self.chunk))
        must_fit = self.rng.random() < 0.5
        if self.kv.allocate_slots(r, tokens, hit, blocks, full_sequence_must_fit=must_fit) is None:
            return False
        self.hits += hit > 0
        self.running.append(self.waiting.popleft())
        r.status, r.num_computed_tokens = RequestStatus.RUNNING, hit
        works[r.request_id] = self.work(s, tokens, 0)
        return self.rng.random() < 0.7

    def work(self, s: Sequence, tokens: int, drafts: int) -> Work:
        r = s.request
        end = r.num_computed_tokens + tokens
        samples = end - drafts >= r.num_tokens + r.num_output_placeholders
        table = [page for block in self.kv.get_block_ids(r.request_id)[0] for page in self.pages_of(block)]
        return Work(s, r.num_computed_tokens, end, drafts, samples, table)

    def pages_of(self, block: int) -> range:
        return range(block * self.pages, (block + 1) * self.pages)

    def drop(self, s: Sequence, abort: bool = False) -> None:
        """Preempt or abort: all pages go back at once, steps in flight still run."""
        self.running.remove(s)
        self.kv.free(s.request)
        s.aborted, s.stale = abort, s.request.num_in_flight_tokens
        s.request.num_computed_tokens = s.request.num_output_placeholders = 0
        if not abort:
            self.preemptions += 1
            s.request.status = RequestStatus.PREEMPTED
            self.waiting.appendleft(s)

    def finish_step(self) -> None:
        works, copies = self.in_flight.popleft()
        pairs = [(self.pages_of(source), self.pages_of(to)) for source, to in copies]
        self.worker.execute(works, [pair for each in pairs for pair in zip(*each)])
        for w in works:
            s, r = w.sequence, w.sequence.request
            r.num_in_flight_tokens -= w.end - w.start
            stale, s.stale = s.stale > 0, max(0, s.stale - (w.end - w.start))
            if s.aborted or s.done or not w.samples:
                continue
            accepted = self.rng.randint(0, w.drafts)
            for position in range(w.end - w.drafts, w.end - w.drafts + 1 + accepted):
                if not s.done:
                    s.sample()
                    if position < w.end - w.drafts + accepted:  # the draft was right, and so is its KV
                        self.worker.write(w, position, self.worker.slot(w, position))
            if not stale:
                r.num_computed_tokens -= w.drafts - accepted
                r.num_output_placeholders -= self.lag
            if s.done and s in self.running:
                self.running.remove(s)
                self.kv.free(r)
                self.goes_on(s)
            elif s.done and s in self.waiting:
                self.waiting.remove(s)
