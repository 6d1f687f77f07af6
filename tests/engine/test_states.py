"""Requests that start from the state of an evicted prefix: the tokens are those of a request that read everything."""

from inspect import signature
from itertools import product
from types import SimpleNamespace

import pytest
from engine import Engine, random_prompt
from quick import quick
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from momentkv_vllm.block_manager.states import StateCache
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.metrics import STATE_HITS, STATE_MISSED_TOKENS, STATE_SAVED_TOKENS, STATES
from momentkv_vllm.page_schedule import PageSchedule

BUDGET, RETIRE = 256, 16
EXACT = {
    "policy": "momentkv",
    "budget_tokens": BUDGET,
    "moment_dtype": "float32",
    "block_size": 16,
    "store_dtype": "model",
}
INT4 = {"store_dtype": "int4", "run_tokens": 8}
SETTINGS = {
    "momentkv": {},
    "momentkv, first": {"correction": "first"},
    "momentkv, int4": {**INT4, "window_tokens": 64},
    "momentkv, int4, first": {**INT4, "correction": "first", "moment_dtype": "int8"},
    "momentkv, a coarse grain": {"prefill_retire_tokens": 96},
    "momentkv, int4, a coarse grain": {**INT4, "prefill_retire_tokens": 64, "window_tokens": 64},
    "keydiff": {"policy": "keydiff"},
    "keydiff, int4": {"policy": "keydiff", **INT4},
    "keydiff, off": {"policy": "keydiff", "correction": "off"},
    "streamingllm": {"policy": "streamingllm"},
    "tova, events of two pages": {"policy": "tova", "prefill": "chunked", "retire_tokens": 32},
    "expected_attention": {"policy": "expected_attention", "prefill": "chunked"},
}
DOCUMENT = random_prompt(900, seed=3)


def questions(document: list[int], count: int = 3) -> list[list[int]]:
    return [document + random_prompt(20 + 10 * i, seed=i)[1:] for i in range(count)]


def event_before(tokens: int) -> int:
    return tokens // RETIRE * RETIRE


def one_by_one(e: Engine, prompts: list[list[int]], new: int = 24, **sampling) -> list[list[int]]:
    return [e.generate([p], new, **sampling)[0] for p in prompts]


def figure(e: Engine, metric) -> float:
    return e.manager.metrics.values[metric, 0]


QUICK = ("momentkv", "momentkv, int4, first", "momentkv, int4, a coarse grain", "keydiff, off", "expected_attention")


CAPS_HITS = "max_cache_hit_length" in signature(Scheduler._get_local_prefix_cache_hit).parameters


@pytest.mark.skipif(not CAPS_HITS, reason="vLLM 0.32 has no cap on hits")
def test_a_cap_on_hits_leaves_what_vllm_finds(engine, models):
    """vLLM 0.33 caps them where it must have more of a token than its KV, and counts it in its own blocks."""
    e = engine(**EXACT, model=models(seed=1), enable_prefix_caching=True)
    first, again = questions(DOCUMENT, 2)
    e.generate([first])
    e.add(again)
    (request,) = e.scheduler.waiting
    lookup = e.scheduler._get_local_prefix_cache_hit
    assert lookup(request)[1] == lookup(request, None)[1] > BUDGET
    assert lookup(request, 160)[1] == 160
    assert lookup(request, 800)[1] < BUDGET
    e.run()


@pytest.mark.parametrize("kind", quick(QUICK, SETTINGS))
def test_tokens_are_those_without_the_cache(engine, models, kind):
    """A document with three questions, then a conversation that goes on from the last answer."""
    options = {**EXACT, **SETTINGS[kind], "model": models(seed=1)}
    plain, cached = engine(**options), engine(**options, enable_prefix_caching=True)
    prompts = questions(DOCUMENT)
    for turn in range(2):
        answers = one_by_one(plain, prompts)
        assert one_by_one(cached, prompts) == answers
        prompts = [p + a + random_prompt(30, seed=turn)[1:] for p, a in zip(prompts, answers, strict=True)]
    starts = [cached.cached_tokens[f"r{i}"] for i in range(6)]
    assert starts[0] == 0 and min(starts[1:]) > 3 * len(DOCUMENT) // 4
    assert figure(cached, STATE_HITS) == 5 and figure(cached, STATE_SAVED_TOKENS) == sum(starts)
    assert not any(plain.cached_tokens.values())


def test_where_requests_start(engine, models):
    """The second question starts a quarter of a budget before the first prompt's end, the third where the second left the
    document, and the next turn at the last event of the answer."""
    e = engine(**EXACT, model=models(seed=1), enable_prefix_caching=True)
    prompts = questions(DOCUMENT, 4)
    answers = one_by_one(e, prompts)
    e.generate([prompts[3] + answers[3] + random_prompt(30)[1:]], 4)
    e.generate([prompts[2]], 4)
    starts = [e.cached_tokens[f"r{i}"] for i in range(6)]
    early, end = event_before(len(prompts[0]) - 1 - BUDGET // 4), event_before(len(DOCUMENT))
    assert starts == [0, early, end, end, event_before(len(prompts[3]) + 23), end]
    assert figure(e, STATE_MISSED_TOKENS) == end - early + event_before(len(prompts[2]) - 1) - end


@pytest.mark.parametrize("chunk", [32, 70, 1024])
def test_states_do_not_depend_on_the_chunk_size(engine, models, chunk):
    options = {**EXACT, "model": models(seed=1)}
    want = one_by_one(engine(**options), questions(DOCUMENT))
    cached = engine(**options, enable_prefix_caching=True, max_num_batched_tokens=chunk)
    assert [one_by_one(cached, questions(DOCUMENT)) for _ in range(2)] == [want, want]
    assert cached.cached_tokens["r1"] > 800


@pytest.mark.parametrize(
    ("policy", "pages"), quick([("momentkv", 58), ("keydiff", 36)], product(("momentkv", "keydiff"), (36, 58)))
)
def test_a_tight_pool(engine, models, policy, pages):
    """The pool holds one sequence and a chunk, or two; the states come and go."""
    options = {**EXACT, "policy": policy, "model": models(seed=1), "max_num_batched_tokens": 128}
    documents = [random_prompt(n, seed=n) for n in (510, 630)]
    prompts = [q for d in documents for q in questions(d)]
    want = engine(**options).generate(prompts, 100)
    tight = engine(**options, enable_prefix_caching=True, num_gpu_blocks_override=pages, watermark=0.0)
    assert [tight.generate(prompts, 100) for _ in range(2)] == [want, want]
    assert figure(tight, STATE_HITS) or pages == 36


def test_a_preempted_request_goes_on_from_its_own_state(engine, models):
    options = {**EXACT, "model": models(seed=1), "max_num_batched_tokens": 100}
    prompt = random_prompt(500)
    want = engine(**options).generate([prompt], 80)
    e = engine(**options, enable_prefix_caching=True)

    def preempt(step):
        if step == 40:
            e.scheduler._preempt_request(e.scheduler.running.pop(), 0.0)

    name = e.add(prompt, 80)
    assert [e.run(preempt)[name]] == want
    assert e.preemptions == 1 and figure(e, STATE_HITS) == 1 and figure(e, STATE_SAVED_TOKENS) > 500


def test_an_aborted_request_leaves_its_state(engine, models):
    options = {**EXACT, "model": models(seed=1), "max_num_batched_tokens": 64}
    want = engine(**options).generate([DOCUMENT], 20)
    e = engine(**options, enable_prefix_caching=True)
    name = e.add(DOCUMENT, 50)
    e.run(lambda step: e.abort(name) if step == 9 else None)
    assert e.generate([DOCUMENT], 20) == want
    assert e.cached_tokens["r1"] > 500


def test_what_differs_shares_no_state(engine, models):
    """cache_salt is part of the key; without it the same text finds the state."""
    e = engine(**EXACT, model=models(seed=1), enable_prefix_caching=True)
    salted = {"prompt_token_ids": DOCUMENT, "cache_salt": "a"}
    want = e.generate([DOCUMENT], 20)
    for prompt in (salted, salted, {**salted, "cache_salt": "b"}, DOCUMENT):
        assert e.generate([prompt], 20) == want
    assert [e.cached_tokens[f"r{i}"] > 0 for i in range(5)] == [False, False, True, False, True]


def test_several_answers_to_one_prompt(engine, models):
    options = {**EXACT, "model": models(seed=1)}
    sampling = {"n": 3, "temperature": 1.0, "seed": 7}
    answers = []
    for caching in (False, True):
        e = engine(**options, enable_prefix_caching=caching)
        e.generate([DOCUMENT], 4)
        e.add(DOCUMENT, 30, **sampling)
        found = {}
        while e.vllm.has_unfinished_requests():
            found |= {o.request_id: [x.token_ids for x in o.outputs] for o in e.step() if o.finished}
        answers.append(list(found.values()))
        assert bool(figure(e, STATE_HITS)) == caching
    assert answers[0] == answers[1]


def test_steps_in_flight(engine, models):
    options = {**EXACT, "model": models(seed=1)}
    plain, cached = engine(**options), engine(**options, pipelined=True, enable_prefix_caching=True)
    prompts = questions(DOCUMENT)
    for turn in range(2):
        answers = plain.generate(prompts, 90)
        assert cached.generate(prompts, 90) == answers
        # Prompts that end at an event, and one token after it.
        prompts = [(p + a)[: event_before(len(p + a)) + turn] for p, a in zip(prompts, answers, strict=True)]
    assert figure(cached, STATE_HITS) >= 3


def test_exact_prompts_leave_no_state_and_start_from_none(engine, models):
    """Prefill auto: up to 650 tokens a prompt is exact. The longer one's states are not for a shorter one that it begins with, and
    the shorter ones' pages are not for a longer one; among themselves they share what stock vLLM's prompts do."""
    options = {**EXACT, "prefill": "auto", "exact_prompt_tokens": 650, "model": models(seed=1)}
    prompts = [DOCUMENT[:600], DOCUMENT, DOCUMENT[:640], DOCUMENT + random_prompt(20)[1:]]
    want = one_by_one(engine(**options), prompts)
    cached = engine(**options, enable_prefix_caching=True)
    assert one_by_one(cached, prompts) == want
    starts = [cached.cached_tokens[f"r{i}"] for i in range(4)]
    assert max(starts[:2]) < BUDGET and starts[3] > 800
    assert starts[2] == 576, "600 tokens less the 16 observed ones, in whole pages"


def test_a_reset_forgets_states(engine, models):
    e = engine(**EXACT, model=models(seed=1), enable_prefix_caching=True)
    e.generate([DOCUMENT], 8)
    assert figure(e, STATES) > 1 and e.vllm.reset_prefix_cache()
    e.generate([DOCUMENT], 8)
    assert e.cached_tokens["r1"] == 0


def test_without_states_a_hit_ends_at_the_budget(engine, models):
    e = engine(**EXACT, state_share=0, model=models(seed=1), enable_prefix_caching=True)
    e.generate([DOCUMENT], 8)
    e.generate([DOCUMENT], 8)
    assert e.cached_tokens["r1"] == BUDGET - 16 and not figure(e, STATES)


@pytest.mark.parametrize("kind", ["momentkv", "momentkv, int4", "keydiff"])
def test_exact_prompts_share_pages_as_in_stock_vllm(engine, models, kind):
    """Prefill full: questions on a document, one after the other and at once, in chunks, and a turn that goes on from an answer."""
    options = {**EXACT, **SETTINGS[kind], "prefill": "full", "model": models(seed=1), "max_num_batched_tokens": 300}
    plain, cached = engine(**options), engine(**options, enable_prefix_caching=True)
    prompts = questions(DOCUMENT)
    answers = one_by_one(plain, prompts)
    assert one_by_one(cached, prompts) == answers
    assert cached.generate(prompts, 24) == answers
    prompts = [prompts[0] + answers[0] + random_prompt(30)[1:]]
    assert one_by_one(cached, prompts) == one_by_one(plain, prompts)
    starts = [cached.cached_tokens[f"r{i}"] for i in range(7)]
    assert starts[0] == 0 and starts[1] >= 880 and min(starts[2:]) >= 896
    assert not figure(cached, STATES)


def test_a_tight_pool_of_exact_prompts(engine, models):
    options = {
        **EXACT,
        "prefill": "auto",
        "exact_prompt_tokens": 700,
        "model": models(seed=1),
        "max_num_batched_tokens": 128,
    }
    prompts = questions(DOCUMENT[:600]) + questions(DOCUMENT)
    want = engine(**options).generate(prompts, 60)
    tight = engine(**options, enable_prefix_caching=True, num_gpu_blocks_override=76, watermark=0.0)
    assert [tight.generate(prompts, 60) for _ in range(2)] == [want, want]
    assert max(tight.cached_tokens[f"r{i}"] for i in range(6, 9)) > BUDGET


def test_an_interval_and_a_share_of_the_pool(engine, models):
    """Pool of 399 pages, states of 8: a share of 0.1 has room for 4 of the 10 that the interval asks for."""
    options = {**EXACT, "model": models(seed=1), "enable_prefix_caching": True, "state_interval_tokens": 64}
    many, few = engine(**options, state_share=1), engine(**options, state_share=0.1)
    for e in (many, few):
        e.generate([DOCUMENT], 8)
        e.generate([DOCUMENT[:700] + random_prompt(100)[1:]], 8)
    assert many.cached_tokens["r1"] == 640 and few.cached_tokens["r1"] < 640
    assert figure(few, STATES) == few.manager.books[0].states.most_states < figure(many, STATES)


def test_a_text_that_waits_is_searched_once(monkeypatch):
    """vLLM looks the request at the head of the queue up at every step; again only when a state or a text came in."""
    init_none_hash(sha256)
    schedule = PageSchedule(16, 12, 0, 4)
    spec = SimpleNamespace(
        schedules=(schedule,), config=EvictionConfig("keydiff", BUDGET), state_fingerprint=lambda config: b""
    )
    states = StateCache(spec, BlockPool(100, True, 16), 0)
    hasher, settings = get_request_block_hasher(16, sha256), SamplingParams(max_tokens=1)
    waiting, other = (
        Request(n, DOCUMENT[:t], settings, None, block_hasher=hasher) for n, t in (("a", 900), ("b", 600))
    )
    seen, events = [], StateCache._events

    def counted(self, *args):
        for event in events(self, *args):
            seen.append(event)
            yield event

    monkeypatch.setattr(StateCache, "_events", counted)

    def looked_up() -> tuple[list[int], int]:
        seen.clear()
        found = [event for event, _ in states.hits(waiting, 0)]
        states.plan(waiting, 0)
        return found, len(seen)

    states.hold(other, 256, states.pool.get_new_blocks(12))
    assert looked_up()[1] > 40 and looked_up()[1] <= 1
    states.remember(other)
    assert looked_up()[1] > 20 and states.plans[waiting].known == 592
    states.hold_window(other, 256, states.pool.get_new_blocks(16))
    assert looked_up() == ([256], 1)
    states.hold(other, 512, states.pool.get_new_blocks(12))
    states.hold_window(other, 512, [None] * 28 + states.pool.get_new_blocks(4))
    found, count = looked_up()
    assert found == [512, 256] and count > 20 and looked_up()[1] < 20
