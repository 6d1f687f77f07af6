"""Async scheduling: every step is scheduled before the output of the last one is in. Same tokens, and pages freed late enough."""

import pytest
from engine import random_prompt

EXACT = {"policy": "momentkv", "budget_tokens": 384, "moment_dtype": "float32", "exact_prompt_tokens": 650}
INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 128}


@pytest.mark.parametrize(("prefill", "store"), [("chunked", INT8), ("full", {}), ("auto", INT8)])
def test_tokens_are_those_of_the_synchronous_engine(engine, models, prefill, store):
    options = {**EXACT, **store, "prefill": prefill, "model": models(seed=1), "enable_prefix_caching": True}
    prompts = [random_prompt(n) for n in (30, 370, 390, 700, 1100)]
    prompts += [p + [50, 60] for p in prompts]
    want = engine(**options).generate(prompts, 80)
    e = engine(**options, pipelined=True)
    assert e.vllm.engine_core.engine_core.batch_queue_size == 2
    assert type(e.scheduler).__name__ == "AsyncMomentKVScheduler"
    assert e.generate(prompts, 80) == want
    assert e.manager.metrics.values and sum(e.cached_tokens.values())


def test_preemption_and_aborts_with_steps_in_flight(engine, models):
    options = {**EXACT, "model": models(seed=1), "enable_prefix_caching": True}
    prompts = [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240)]
    want = engine(**options).generate(prompts, 250)
    tight = engine(**options, pipelined=True, num_gpu_blocks_override=80, watermark=0.0, max_num_batched_tokens=128)
    assert tight.generate(prompts, 250) == want and tight.preemptions
    victim, other = tight.add(random_prompt(900), 200), tight.add(random_prompt(500), 40)
    tokens = tight.run(lambda step: tight.abort(victim) if step == 20 else None)
    assert victim not in tokens and len(tokens[other]) == 40


def test_pages_in_flight_are_not_freed(engine):
    """A page retired by a step in flight stays until that step's output is in: one page more than in the synchronous engine."""
    e = engine(policy="momentkv", budget_tokens=256, pipelined=True)
    e.generate([random_prompt(100)], 300)
    assert e.peak_pages["r0"] in (16, 17)
    assert e.manager.max_admission_blocks_per_request >= 16 + 2 * 256 // 16
