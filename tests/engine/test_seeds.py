"""Sampled requests with a seed: answered, with the same tokens however the prompt was cut, with and without eviction."""

import pytest
from engine import random_prompt

SAMPLED = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
EVICT = {"policy": "momentkv", "budget_tokens": 256}
PROMPTS = [random_prompt(n) for n in (200, 250, 400, 700)]


@pytest.mark.parametrize("options", [{"block_size": 32}, EVICT, EVICT | {"prefill": "full"}])
def test_tokens_do_not_depend_on_how_the_prompt_was_cut(engine, models, options):
    """vLLM 0.32.0 on a CPU ends at the first seeded prompt that takes several steps."""
    whole = engine(models(seed=1), **options, max_num_batched_tokens=1024)
    want = [whole.generate([p], 12, **SAMPLED)[0] for p in PROMPTS]
    assert want[0] != whole.generate(PROMPTS[:1], 12, **SAMPLED | {"seed": 8})[0]
    cut = engine(models(seed=1), **options, max_num_batched_tokens=64, enable_prefix_caching=True)
    assert cut.generate(PROMPTS, 12, **SAMPLED) == want
    assert cut.generate(PROMPTS, 12, **SAMPLED) == want, "prompts that begin with cached pages"


def test_a_preempted_seeded_request_draws_nothing_twice(engine, models):
    options = {**EVICT, "model": models(seed=1)}
    prompts = [random_prompt(n, seed=5) for n in (100, 110, 120, 130)]
    want = engine(**options).generate(prompts, 150, **SAMPLED)
    tight = engine(**options, num_gpu_blocks_override=40, watermark=0.0, max_num_batched_tokens=96)
    assert tight.generate(prompts, 150, **SAMPLED) == want and tight.preemptions


def steps_of(e, prompt: list[int]) -> list[int]:
    """Tokens of each step of one request."""
    scheduled, schedule = [], e.scheduler.schedule

    def noted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        scheduled.append(output.total_num_scheduled_tokens)
        return output

    e.scheduler.schedule = noted
    e.generate([prompt], 4)
    e.scheduler.schedule = schedule
    return [tokens for tokens in scheduled if tokens]


@pytest.mark.parametrize("options", [{}, {"prefill": "full"}, {"policy": "streamingllm"}, {"policy": "snapkv"}])
def test_prompts_are_cut_only_where_it_has_a_use(engine, options):
    e = engine(**EVICT | options, max_num_batched_tokens=1024, enable_prefix_caching=True)
    below = [random_prompt(n) for n in (200, 241, 249, 255)]
    assert [steps_of(e, p)[0] for p in below] == [200, 241, 249, 255], "below the budget as in stock vLLM"
    first, *rest = steps_of(e, random_prompt(400))
    spec = e.manager.kv_cache_spec
    # An exact prompt's first event is at its end.
    assert first == spec.cacheable_before(spec.schedule.first_event_of(400))
    # A state is kept a quarter of the budget before the prompt's end, and the second time it is read from there.
    read = [320 - first, 80] if e.manager.books[0].states else [400 - first]
    assert rest[: len(read)] == read
    assert steps_of(e, random_prompt(400))[0] <= read[-1], "the second time nothing is left to cache"
    uncached = engine(**EVICT | options, max_num_batched_tokens=1024)
    assert steps_of(uncached, random_prompt(400))[0] == 400
