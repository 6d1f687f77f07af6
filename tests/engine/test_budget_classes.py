"""Requests of several budgets in one engine: each gets what an engine with its budget alone gives it."""

import pytest
import torch
from engine import Engine, random_prompt
from measured_heads import capacities
from vllm.exceptions import VLLMValidationError

from momentkv_vllm.metrics import EVICTED_TOKENS, LIVE_PAGES, STATES, of_classes

pytestmark = pytest.mark.engine

SETTINGS = {"policy": "momentkv", "moment_dtype": "float32", "block_size": 16}
MEASURED = {"store_dtype": "int8", "run_tokens": 8, "head_budgets": "measured"}
BUDGETS = {"small": 256, "large": 512, "exact": "off"}
PROMPTS = [random_prompt(n, seed=7) for n in (60, 300, 700, 900)]
CASES = [(name, prompt) for prompt in PROMPTS for name in BUDGETS]
NEW = 24


@pytest.fixture
def alone(engine, models):
    """Tokens that an engine of one class gives each prompt."""

    def answers(name: str, prompts: list[list[int]], **options) -> list[list[int]]:
        budget = BUDGETS[name]
        settings = {} if budget == "off" else {**SETTINGS, "budget_tokens": budget}
        return engine(models(seed=1), **settings, **options).generate(prompts, NEW)

    return answers


def ask(e: Engine, cases=CASES, **sampling) -> list[list[int]]:
    names = [e.add(prompt, NEW, extra_args={"kv_budget": name}, **sampling) for name, prompt in cases]
    tokens = e.run()
    return [tokens[n] for n in names]


def wanted(alone, **options) -> list[list[int]]:
    found = {name: alone(name, PROMPTS, **options) for name in BUDGETS}
    return [found[name][PROMPTS.index(prompt)] for name, prompt in CASES]


def figure(e: Engine, place: int, name: str) -> float:
    metric = of_classes(list(BUDGETS))[place]
    return e.manager.metrics.values[metric, list(BUDGETS).index(name)]


def test_a_batch_of_all_classes(engine, models, alone):
    """Chunks and decode steps of all classes in one batch; tokens and pages are those of an engine with one budget."""
    e = engine(models(seed=1), **SETTINGS, budgets=BUDGETS)
    tokens = ask(e)
    want = wanted(alone)
    assert tokens == want
    assert len({tuple(t) for t in tokens[9:]}) == 3, "the classes answer alike: the test proves nothing"
    pages = dict(zip(CASES_OF_900, (e.peak_pages[f"r{i}"] for i in (9, 10, 11)), strict=True))
    assert pages["small"] <= 16 + 16 and 32 <= pages["large"] <= 32 + 16 and pages["exact"] == (900 + NEW - 1) // 16 + 1
    assert figure(e, 3, "small") > figure(e, 3, "large") > 0 == figure(e, 3, "exact")
    assert sum(figure(e, 3, name) for name in BUDGETS) == e.manager.metrics.values[EVICTED_TOKENS, 0]
    assert not any(figure(e, place, name) for place in (1, 2) for name in BUDGETS)
    assert not e.manager.chosen


CASES_OF_900 = list(BUDGETS)


@pytest.mark.parametrize("policy", ["h2o", "streamingllm", "keydiff"])
def test_other_policies(engine, models, policy):
    options = {"policy": policy, "correction": "off", "block_size": 16}
    got = ask(engine(models(seed=1), **options, budgets=BUDGETS), CASES[6:9])
    want = [
        engine(models(seed=1), **options, budget_tokens=tokens).generate([PROMPTS[2]], NEW)[0] for tokens in (256, 512)
    ]
    assert got == [*want, engine(models(seed=1)).generate([PROMPTS[2]], NEW)[0]]


def test_without_a_choice_it_is_the_first(engine, models, alone):
    e = engine(models(seed=1), **SETTINGS, budgets="exact=off,small=256")
    plain = e.generate(PROMPTS[2:], NEW)
    assert plain == alone("exact", PROMPTS[2:]) and not e.manager.metrics.values[EVICTED_TOKENS, 0]
    assert ask(e, [("small", p) for p in PROMPTS[2:]]) == alone("small", PROMPTS[2:])


@pytest.mark.parametrize("prefill", ["auto", "full"])
def test_exact_prompts(engine, models, alone, prefill):
    options = {"prefill": prefill, "exact_prompt_tokens": 650}
    got = ask(engine(models(seed=1), **SETTINGS, **options, budgets=BUDGETS, enable_prefix_caching=True))
    found = {n: alone(n, PROMPTS, **options if n != "exact" else {}) for n in BUDGETS}
    assert got == [found[name][PROMPTS.index(prompt)] for name, prompt in CASES]


def test_heads_with_budgets_of_their_own(engine, models, alone):
    """Every class has its table; the one of "exact" needs none."""
    e = engine(models(seed=1), **SETTINGS, **MEASURED, budgets=BUDGETS)
    small, large = (torch.tensor(capacities(e, number)) for number in (0, 1))
    assert capacities(e, 2) is None and (large > small).all() and large.unique().numel() > 1
    cases = [(name, random_prompt(n, seed=7)) for n in (700, 1300, 1900) for name in BUDGETS]
    tokens = ask(e, cases)
    for place, name in enumerate(BUDGETS):
        prompts = [prompt for _, prompt in cases[::3]]
        options = MEASURED if name != "exact" else {}
        assert tokens[place::3] == alone(name, prompts, **options)
        if name != "exact":
            assert tokens[place::3] != alone(name, prompts, **MEASURED | {"head_budgets": "equal"}), "heads must matter"


@pytest.mark.parametrize("quantised", [False, True])
def test_prefixes_and_states_stay_in_their_class(engine, models, alone, quantised):
    """The same prompts of every class, twice, in an order in which another class was last: hits in the own class alone."""
    options = MEASURED if quantised else {}
    e = engine(models(seed=1), **SETTINGS, **options, budgets=BUDGETS, enable_prefix_caching=True)
    want = wanted(lambda name, *args: alone(name, *args, **options if name != "exact" else {}))
    first = [ask(e, [case])[0] for case in CASES]
    cached = [e.cached_tokens[f"r{i}"] for i in range(len(CASES))]
    assert first == want
    # A longer prompt has no prefix in common with a shorter one, so that only another class's could be found.
    assert not any(cached)
    again = [ask(e, [case])[0] for case in reversed(CASES)][::-1]
    assert again == want
    hits = dict(zip(CASES_OF_900, [e.cached_tokens[f"r{len(CASES) + i}"] for i in (2, 1, 0)], strict=True))
    assert hits["exact"] == 896 and all(hits.values())
    assert e.manager.metrics.values[STATES, 0] == sum(b.states.count() for b in e.manager.books if b.states) > 2


def test_preemption(engine, models, alone):
    """Too few pages for all: requests are preempted and read again, in their class."""
    tight = engine(
        models(seed=1), **SETTINGS, budgets=BUDGETS, num_gpu_blocks_override=90, max_model_len=1000, watermark=0.0,
        enable_prefix_caching=True,
    )  # fmt: skip
    cases = [(name, random_prompt(n, seed=3)) for n in (250, 400) for name in BUDGETS] * 2
    answers = [tight.add(prompt, 150, extra_args={"kv_budget": name}) for name, prompt in cases]
    tokens = tight.run()
    assert tight.preemptions
    roomy = engine(models(seed=1), **SETTINGS, budgets=BUDGETS)
    calm = [roomy.add(prompt, 150, extra_args={"kv_budget": budget}) for budget, prompt in cases]
    want = roomy.run()
    assert [tokens[name] for name in answers] == [want[name] for name in calm] and not roomy.preemptions


def test_steps_in_flight(engine, models, alone):
    e = engine(models(seed=1), **SETTINGS, budgets=BUDGETS, pipelined=True, enable_prefix_caching=True)
    assert ask(e) == wanted(alone)


def test_several_answers(engine, models):
    """n = 2: both are of the class, which their pages show."""
    e = engine(models(seed=1), **SETTINGS, budgets=BUDGETS)
    peak = {name: 0 for name in BUDGETS}

    def look(step):
        for name in BUDGETS:
            peak[name] = max(peak[name], int(figure(e, 1, name)))

    e.add(PROMPTS[2], 100, extra_args={"kv_budget": "large"}, n=2, temperature=1.0, seed=1)
    e.run(look)
    assert peak["small"] == peak["exact"] == 0 and 2 * 30 <= peak["large"] <= 2 * (32 + 16)


def test_an_unknown_class_is_refused_and_nobody_else(engine, models, alone):
    e = engine(models(seed=1), **SETTINGS, budgets=BUDGETS)
    other = e.add(PROMPTS[3], NEW)
    for _ in range(2):
        e.step()
    for wrong in ("medium", 256, True, ["small"]):
        with pytest.raises(VLLMValidationError, match="is not one of small, large, exact; leave it out for small"):
            e.add(PROMPTS[0], NEW, extra_args={"kv_budget": wrong})
    assert e.run()[other] == alone("small", PROMPTS[3:])[0]


def test_one_class_is_named_by_its_number(engine, models, alone):
    e = engine(models(seed=1), **SETTINGS, budget_tokens=256)
    assert ask(e, [("256", PROMPTS[2]), (256, PROMPTS[2])]) == 2 * alone("small", PROMPTS[2:3])
    with pytest.raises(VLLMValidationError, match="'off' is not one of 256"):
        e.add(PROMPTS[0], NEW, extra_args={"kv_budget": "off"})
    assert e.manager.metrics.values[LIVE_PAGES, 2] == 0


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_response_says_what_it_held(engine, models, pipelined):
    e = engine(models(seed=1), **SETTINGS, budgets=BUDGETS, pipelined=pipelined)
    said = {}
    for name in BUDGETS:
        e.add(PROMPTS[3], NEW, extra_args={"kv_budget": name, "kv_eviction_usage": True})
        while e.vllm.has_unfinished_requests():
            for output in e.step():
                if output.finished:
                    said[name] = output.kv_transfer_params["kv_eviction"]
    computed = len(PROMPTS[3]) + NEW - 1
    for number, (name, usage) in enumerate(said.items()):
        schedule = e.manager.books[number].schedule
        evicted = schedule.evicted_tokens(schedule.boundary_column(computed))
        assert usage["kv_budget"] == name
        assert (usage["held_tokens"], usage["evicted_tokens"]) == (computed - evicted, evicted)
    assert said["small"]["held_tokens"] <= 256 and said["small"]["held_pages"] <= 16
    assert said["large"]["held_pages"] <= 32 and said["exact"]["held_pages"] == computed // 16 + 1
    e.add(PROMPTS[0], 1)
    assert [o.kv_transfer_params for o in e.step()] == [None] or pipelined
    e.run()
    for wrong in ({"kv_eviction_usage": "yes"}, {"kv_eviction_usage": 2}):
        with pytest.raises(VLLMValidationError, match="is not true or false"):
            e.add(PROMPTS[0], 1, extra_args=wrong)
    with pytest.raises(VLLMValidationError, match="tells of one answer, and n=2"):
        e.add(PROMPTS[0], 1, extra_args={"kv_eviction_usage": True}, n=2, temperature=1.0)


def test_a_pool_too_small_for_off_is_refused(engine, models):
    with pytest.raises(ValueError, match="256 for --max-model-len 4096 of requests with kv_budget 'exact'"):
        engine(models(seed=1), **SETTINGS, budgets=BUDGETS, num_gpu_blocks_override=200)
    with pytest.raises(ValueError, match="of --kv-budget 128 is too small|budget_tokens=32 is too small"):
        engine(models(seed=1), **SETTINGS, budgets={"large": 512, "tiny": 32})
