"""Heads with budgets of their own in a real vLLM engine: who gets them, what is refused, tokens independent of scheduling."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import random_prompt
from measured_heads import capacities

from momentkv_vllm.attention.head_reach import BETWEEN, REPEATED, Probe, random_tokens
from momentkv_vllm.head_budgets import LEAST_SHARE

PAGE, NEW = 16, 48
OURS = {"policy": "momentkv", "budget_tokens": 128, "store_dtype": "int4", "block_size": PAGE}


@pytest.fixture
def spread(models):
    """A model whose heads look differently far."""
    return models(seed=1)


def test_auto_measures_and_every_engine_finds_the_same(engine, spread):
    first, second = (engine(**OURS, model=spread, max_num_batched_tokens=n) for n in (64, 512))
    found = capacities(first)
    assert found == capacities(second)
    schedule = first.manager.schedule
    held = torch.tensor(found)
    assert held.unique().numel() > 1 and held.sum() == schedule.store_tokens * held.numel()
    assert held.min() >= schedule.store_tokens // LEAST_SHARE // 8 * 8


def test_tokens_do_not_depend_on_chunk_size_or_batch(engine, spread):
    prompts = [random_prompt(n) for n in (900, 1100, 1300)]
    alone = [engine(**OURS, model=spread).generate([p], max_tokens=NEW)[0] for p in prompts]
    assert engine(**OURS, model=spread, max_num_batched_tokens=96).generate(prompts, max_tokens=NEW) == alone
    equal = engine(**OURS, model=spread, head_budgets="equal").generate(prompts, max_tokens=NEW)
    assert equal != alone, "what heads hold must matter here"


@pytest.mark.parametrize(
    "options",
    [
        {"prefill": "full"},
        {"prefill": "auto", "exact_prompt_tokens": 1000},
        {"prefill_retire_tokens": 64},
        {"prefill_retire_tokens": 512},
        # First events of more tokens than a head has tiles of its own for.
        {"budget_tokens": 512, "retire_tokens": 256, "store_dtype": "int8", "dtype": "bfloat16"},
    ],
    ids=["full", "auto", "some at once", "more than the store", "small store"],
)
def test_events_of_many_tokens(engine, spread, options):
    prompts, options = [random_prompt(n) for n in (150, 900, 1300)], {**OURS, "model": spread, **options}
    one, many = (engine(**options, head_budgets="measured", max_num_batched_tokens=n) for n in (512, 96))
    alone = [one.generate([p], max_tokens=NEW)[0] for p in prompts]
    assert capacities(one) == capacities(many) and torch.tensor(capacities(one)).unique().numel() > 1
    if "dtype" not in options:
        assert many.generate(prompts, max_tokens=NEW) == alone
        equal = engine(**options, head_budgets="equal").generate(prompts, max_tokens=NEW)
        assert equal != alone, "what heads hold must matter here"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_triton_answers_as_the_cpu_does(spread):
    """In its interpreter, which is chosen before Triton is imported."""
    script = Path(__file__).parents[1] / "support/interpreted_engine.py"
    command, env = [sys.executable, "-P", str(script), str(spread)], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    cpu, triton, equal = (found[name] for name in ("cpu, measured", "triton, measured", "cpu, equal"))
    assert triton == cpu and len({n for heads in cpu["held"] for n in heads}) > 2
    assert equal["answers"] != cpu["answers"], "what heads hold must matter here"


def test_a_cached_state_answers_as_the_prompt_does(engine, spread):
    document = random_prompt(1200, seed=3)
    prompts = [document + random_prompt(40, seed)[1:] for seed in range(3)]
    plain = engine(**OURS, model=spread).generate(prompts, max_tokens=NEW)
    cached = engine(**OURS, model=spread, enable_prefix_caching=True)
    assert [cached.generate([p], max_tokens=NEW)[0] for p in prompts] == plain
    assert cached.cached_tokens["r2"] > 1000


def test_a_policy_that_observes_nothing(engine, spread):
    options = {**OURS, "policy": "keydiff", "run_tokens": 8, "model": spread}
    assert capacities(engine(**options)) is None, "other people's policies are as published"
    e = engine(**options, head_budgets="measured")
    prompts = [random_prompt(n) for n in (900, 1100)]
    assert capacities(e) and e.generate(prompts, max_tokens=NEW) == engine(
        **options, head_budgets="measured", max_num_batched_tokens=64
    ).generate(prompts, max_tokens=NEW)


def test_below_the_budget_it_is_stock(engine, spread):
    prompts = [random_prompt(n) for n in (40, 90)]
    stock = engine(block_size=32, model=spread).generate(prompts)
    assert engine(**{**OURS, "block_size": 32}, model=spread).generate(prompts) == stock


def test_the_pass_is_the_models_own_attention(engine, spread):
    """The hidden states behind it are those of vLLM's attention, so what later layers show is what they do in service."""
    query, key, value = torch.randn(3, 100, 4, 32)
    output, probe = torch.empty_like(query), Probe(0.2)
    probe.attend(query, key[:, :2], value[:, :2], output)
    wide = (x[:, :2].repeat_interleave(2, 1).transpose(0, 1) for x in (key, value))
    want = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), *wide, is_causal=True, scale=0.2)
    torch.testing.assert_close(output, want.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert probe.reach.shape == (2,) and (probe.reach >= 0).all() and (probe.reach <= 1).all()


def test_who_copies_reaches_far():
    """Queries that find the key of the same token: the first time is REPEATED + BETWEEN tokens before."""
    ids = random_tokens(1000, 4096)
    assert len(ids) == 2 * REPEATED + BETWEEN and torch.equal(ids[:REPEATED], ids[-REPEATED:])
    rows = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))[ids].unsqueeze(1)
    near = torch.arange(len(ids)).float().view(-1, 1, 1) * torch.ones(64)
    probes = [Probe(1.0), Probe(1.0)]
    probes[0].attend(rows, rows, rows, torch.empty_like(rows))
    probes[1].attend(torch.ones_like(near), near, rows, torch.empty_like(rows))
    assert 0.3 < probes[0].reach.item() <= 0.5 + 0.2 and probes[1].reach.item() < 0.01


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"store_dtype": "model"}, "store_dtype 'model'"),
        ({"run_tokens": 1}, "run_tokens 1"),
        ({"policy": "snapkv"}, "policy 'snapkv', whose score no kernel has"),
        ({"kernels": "reference"}, "kernels 'reference'"),
    ],
)
def test_where_heads_cannot_differ(engine, spread, caplog, options, why):
    """Asked for it is refused, "auto" is "equal" and says so."""
    with pytest.raises(ValueError, match=f"{why}.*use 'auto' or 'equal'"):
        engine(**{**OURS, **options}, head_budgets="measured", model=spread)
    logger = logging.getLogger("vllm.momentkv_vllm.vllm_seams.heads")
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(caplog.handler)
    e = engine(**{**OURS, "head_budgets": "auto", **options}, model=spread)
    logger.removeHandler(caplog.handler)
    assert capacities(e) is None
    assert re.search(f"head_budgets auto is equal; measured does not support {why}", caplog.text)
