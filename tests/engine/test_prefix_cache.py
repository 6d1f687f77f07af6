"""Prefix caching below the budget: hits are honoured, rewritten pages never reach another request, shared prompts stay cached.

Without states (tests/engine/test_states.py), so that hits end before the first eviction."""

import pytest
from engine import random_prompt
from quick import quick
from vllm import EngineArgs

BUDGET = 384
EXACT = {
    "policy": "momentkv", "budget_tokens": BUDGET, "moment_dtype": "float32", "exact_prompt_tokens": 650, "state_share": 0,
}  # fmt: skip
SHORT, LONG = random_prompt(200, seed=9), random_prompt(700, seed=8)
"""Two system prompts: below and above the budget."""


def conversations(system: list[int]) -> list[list[int]]:
    """One system prompt before questions of many lengths: some sequences stay below the budget, the others evict."""
    return [system + random_prompt(n, seed=n)[1:] for n in (20, 60, 150, 260, 500, 900)]


@pytest.mark.parametrize("prefill", ["chunked", "full", "auto"])
def test_tokens_are_those_without_the_cache_and_system_prompts_stay(engine, models, prefill):
    options = {**EXACT, "prefill": prefill, "model": models(seed=1)}
    prompts = conversations(SHORT) + conversations(LONG)
    plain = engine(**options)
    want = [plain.generate(prompts, 32) for _ in range(2)]
    cached = engine(**options, enable_prefix_caching=True, num_gpu_blocks_override=1000)
    assert [cached.generate(prompts, 32) for _ in range(2)] == want
    assert cached.manager.metrics.values and not any(plain.cached_tokens.values())
    # The second time every sequence finds its system prompt, although all of them have evicted in between.
    second = [cached.cached_tokens[f"r{i}"] for i in range(len(prompts), 2 * len(prompts))]
    assert min(second[:6]) >= len(SHORT) // 16 * 16
    exact = [prefill == "full" or (prefill == "auto" and len(p) <= 650) for p in prompts]
    for prompt, hit, whole in list(zip(prompts, second, exact))[6:]:
        # The queries before an event are its own: before the first one at the budget, or at the prompt's end.
        assert hit == (len(prompt) - 16) // 16 * 16 if whole else hit == BUDGET - 16, len(prompt)


def test_a_prompt_read_in_one_chunk_longer_than_the_budget_leaves_its_prefix(engine, models):
    options = {**EXACT, "model": models(seed=1), "max_num_batched_tokens": 2048}
    prompts = conversations(LONG)
    want = [engine(**options).generate([p], 40)[0] for p in prompts[:1]]
    cached = engine(**options, enable_prefix_caching=True)
    assert cached.generate(prompts[:1], 40) == want
    cached.generate(prompts[1:2], 40)
    assert cached.cached_tokens == {"r0": 0, "r1": BUDGET - 16}


def test_the_next_turn_of_an_evicted_conversation_finds_its_exact_beginning(engine, models):
    options = {**EXACT, "model": models(seed=1)}
    plain, cached = engine(**options), engine(**options, enable_prefix_caching=True)
    history = random_prompt(300, seed=4)
    for turn in range(4):
        answers = [e.generate([history], 100)[0] for e in (plain, cached)]
        assert answers[0] == answers[1]
        history = history + answers[0] + random_prompt(30, seed=turn)[1:]
    assert [cached.cached_tokens[f"r{turn}"] for turn in range(4)] == [0, 368, 368, 368]


def test_preemption_pressure_changes_no_token(engine, models):
    options = {**EXACT, "model": models(seed=1)}
    prompts = [SHORT + random_prompt(n, seed=5)[1:] for n in (10, 20, 30, 40, 50, 300)]
    want = engine(**options).generate(prompts, 250)
    tight = engine(**options, enable_prefix_caching=True, num_gpu_blocks_override=80, watermark=0.0)
    assert tight.generate(prompts, 250) == want
    assert tight.preemptions and sum(tight.cached_tokens.values())


def test_requests_join_while_the_owner_of_their_prefix_evicts(engine, models):
    """A sibling a step around step 69, in which the owner gets the last page of its budget and is sealed."""
    options = {**EXACT, "model": models(seed=1)}
    prompts = [SHORT + random_prompt(n, seed=n)[1:] for n in range(100, 180, 10)]
    plain = engine(**options)
    want = [plain.generate([p], 120)[0] for p in prompts]
    cached = engine(**options, enable_prefix_caching=True, max_num_batched_tokens=512)
    names = [cached.add(prompts[0], 120)]

    def join(step):
        if step >= 65 and len(names) < len(prompts):
            names.append(cached.add(prompts[len(names)], 120))

    tokens = cached.run(join)
    assert [tokens[n] for n in names] == want and len(names) == len(prompts)
    assert all(cached.cached_tokens[n] >= 192 for n in names[1:])


def test_abort_of_a_sequence_that_shares_pages(engine):
    e = engine(**EXACT, enable_prefix_caching=True)
    prompts = conversations(SHORT)
    e.generate(prompts[:1], 8)
    names = [e.add(p, 100) for p in prompts]
    tokens = e.run(lambda step: e.abort(names[step // 5]) if step in (5, 15, 25) else None)
    assert sorted(tokens) == sorted(set(names) - {names[1], names[3], names[5]})


@pytest.mark.parametrize(
    ("policy", "observed"),
    quick([("expected_attention", 128), ("tova", 1)], [("snapkv", 32), ("expected_attention", 128), ("tova", 1)]),
)
def test_policies_that_observe_attention_still_see_their_queries(engine, models, policy, observed):
    options = {**EXACT, "policy": policy, "prefill": "chunked", "model": models(seed=1)}
    prompts = conversations(LONG)
    want = engine(**options).generate(prompts, 24)
    cached = engine(**options, enable_prefix_caching=True)
    assert [cached.generate(prompts, 24) for _ in range(2)] == [want, want]
    assert cached.cached_tokens["r11"] == (BUDGET - observed) // 16 * 16


def config_of(model, policy: str, **options):
    eviction = {"kv_eviction": {"policy": policy, "budget_tokens": 256}}
    return EngineArgs(
        model=str(model), additional_config=eviction, max_model_len=2048, **options
    ).create_engine_config()


def test_it_is_on_by_default_except_where_every_query_must_be_seen(models):
    config = config_of(models(), "momentkv")
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.get_scheduler_cls().__name__ == "MomentKVScheduler"
    assert not config_of(models(), "h2o").cache_config.enable_prefix_caching
    with pytest.raises(ValueError, match="--enable-prefix-caching .*observe every query"):
        config_of(models(), "h2o", enable_prefix_caching=True)


def test_a_scheduler_of_the_users_own_stays(models):
    own = "vllm.v1.core.sched.scheduler.Scheduler"
    assert config_of(models(), "momentkv", scheduler_cls=own).scheduler_config.scheduler_cls == own
