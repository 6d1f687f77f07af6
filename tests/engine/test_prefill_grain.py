"""Events further apart while a prompt is read: nothing else changes, neither what a request says nor what it may hold."""

import pytest
from engine import random_prompt

BUDGET, RETIRE, GRAIN, PAGE = 256, 16, 128, 16
COARSE = {
    "policy": "momentkv", "budget_tokens": BUDGET, "moment_dtype": "float32", "block_size": PAGE, "prefill_retire_tokens": GRAIN,
}  # fmt: skip
KINDS = {
    "momentkv": {},
    "momentkv, int4": {"store_dtype": "int4", "run_tokens": 8, "window_tokens": 64},
    "momentkv, auto": {"prefill": "auto", "exact_prompt_tokens": 650},
    "keydiff": {"policy": "keydiff"},
    "h2o": {"policy": "h2o"},
    "expected_attention": {"policy": "expected_attention", "prefill": "chunked"},
}
LENGTHS = (30, 250, 385, 700, 1100)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_chunk_size_or_batch(engine, models, kind):
    options = {**COARSE, **KINDS[kind], "model": models(seed=1)}
    prompts = [random_prompt(n) for n in LENGTHS]
    alone = engine(**options, max_num_batched_tokens=2048)
    one_by_one = [alone.generate([p], 24)[0] for p in prompts]
    for chunk in (48, 200):
        assert engine(**options, max_num_batched_tokens=chunk).generate(prompts, 24) == one_by_one


def test_preemption_gives_the_same_tokens(engine, models):
    """While the prompt is read, and again while it is answered: the tokens of the answer are then read too, in the finer grain."""
    options = {**COARSE, "model": models(seed=1), "max_num_batched_tokens": 100}
    prompt = random_prompt(700)
    e = engine(**options)
    calm = e.generate([prompt], 80)

    def preempt(step):
        if step in (4, 60):
            e.scheduler._preempt_request(e.scheduler.running.pop(), 0.0)

    name = e.add(prompt, 80)
    assert [e.run(preempt)[name]] == calm and e.preemptions == 2


def test_the_grain_is_held_while_a_prompt_is_read_and_no_longer(engine):
    chunk = 64
    e = engine(**COARSE, max_num_batched_tokens=chunk)
    schedule = e.manager.schedule
    e.generate([random_prompt(900)], 1)
    read = max(e.peak_pages.values())
    assert schedule.budget_pages + (GRAIN - RETIRE - chunk) // PAGE < read <= schedule.peak_pages(chunk)
    name = e.add(random_prompt(900), 100)
    decoding = []

    def look(_):
        if any(r.num_output_tokens > 1 for r in e.scheduler.running):
            decoding.extend(e.manager.live_pages.values())

    e.run(look)
    assert name and max(decoding) <= schedule.budget_pages, "the budget holds again once the prompt is read"


def test_a_pool_that_the_grain_does_not_fit_is_refused(engine):
    options = {**COARSE, "max_num_batched_tokens": 64, "max_num_seqs": 1, "max_model_len": 512}
    pages = engine(**options).manager.schedule.peak_pages(64)
    engine(**options, num_gpu_blocks_override=pages + 1).generate([random_prompt(480)], 20)
    with pytest.raises(ValueError, match=f"prefill step of 64 tokens and prefill_retire_tokens={GRAIN}"):
        engine(**options, num_gpu_blocks_override=pages)


def test_below_the_budget_tokens_are_stock(engine, models):
    prompts = [random_prompt(n) for n in (30, 200, 239)]
    stock = engine(models(seed=1)).generate(prompts, 16)
    assert engine(**COARSE, model=models(seed=1)).generate(prompts, 16) == stock
