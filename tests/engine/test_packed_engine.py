"""Quantised stores in a real vLLM engine: the simulator's answers, tokens independent of scheduling, what is refused."""

import pytest
import torch
from engine import random_prompt
from quick import quick
from simulated import log_probabilities

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout

PAGE, PROMPT, NEW = 16, 600, 40
INT4 = {"policy": "momentkv", "budget_tokens": 256, "store_dtype": "int4", "run_tokens": 8, "window_tokens": 64}
SETTINGS = {
    "keydiff, runs of 8": {"policy": "keydiff", "store_dtype": "int4", "run_tokens": 8},
    "momentkv, small window": {"policy": "momentkv", "store_dtype": "int4", "run_tokens": 8, "window_tokens": 32},
    "momentkv, int8": {"policy": "momentkv", "store_dtype": "int8"},
    "first order, full": {
        "policy": "snapkv", "store_dtype": "int4", "run_tokens": 16, "correction": "first", "moment_dtype": "int8",
    },
    "every query observed": {"policy": "h2o", "store_dtype": "int4"},
    "16 bit in runs": {"policy": "momentkv", "run_tokens": 8},
}  # fmt: skip


# The reference takes seconds: one quantised store of each policy that has a record, and what is not quantised.
OF_THE_REFERENCE = ["momentkv, small window", "first order, full", "16 bit in runs"]
CASES = [*(("reference", kind) for kind in SETTINGS), *(("cpu", kind) for kind in SETTINGS)]
QUICK = [case for case in CASES if case[0] == "cpu" or case[1] in OF_THE_REFERENCE]


@pytest.mark.parametrize(("kernels", "kind"), quick(QUICK, CASES))
def test_log_probabilities_are_the_simulators(engine, models, kernels, kind):
    """A number at the edge of a step of four bits may fall to the other side. The CPU kernels round queries and weights to 16 bits,
    which may change a rank between near equals."""
    usual, most = {"reference": (1e-3, 3e-3), "cpu": (3e-2, 3e-2)}[kernels]
    # Heads of the simulator hold as many tokens each.
    values = {"budget_tokens": 128, **SETTINGS[kind], "kernels": kernels, "head_budgets": "equal"}
    found = log_probabilities(engine, models(seed=1), values, PAGE, PROMPT, NEW)
    apart = (found.simulator - found.engine).abs()
    assert apart.quantile(0.95) < usual and apart.max() < most
    assert (found.simulator - found.full).abs().max() > 3 * most, "eviction must matter here"


def test_tokens_do_not_depend_on_chunk_size_or_batch(engine):
    prompts = [random_prompt(n) for n in (900, 1100, 700)]
    alone = [engine(**INT4, block_size=PAGE).generate([p], max_tokens=48)[0] for p in prompts]
    assert engine(**INT4, block_size=PAGE, max_num_batched_tokens=96).generate(prompts, max_tokens=48) == alone


def test_preemption_gives_the_same_tokens(engine):
    """31 pages: both prompts fit, and not one token more of both."""
    prompts = [random_prompt(240, seed) for seed in (1, 2)]
    alone = [engine(**INT4, block_size=PAGE).generate([p], max_tokens=64)[0] for p in prompts]
    tight = engine(**INT4, block_size=PAGE, num_gpu_blocks_override=32, max_num_batched_tokens=100, watermark=0.0)
    assert tight.generate(prompts, max_tokens=64) == alone
    assert tight.preemptions


def test_a_prefix_is_cached_and_the_store_is_private(engine):
    shared = random_prompt(160)
    prompts = [shared + random_prompt(700, seed) for seed in (1, 2, 3)]
    plain = engine(**INT4, block_size=PAGE, enable_prefix_caching=False).generate(prompts, max_tokens=24)
    cached = engine(**INT4, block_size=PAGE, enable_prefix_caching=True)
    assert [cached.generate([p], max_tokens=24)[0] for p in prompts] == plain
    assert cached.cached_tokens["r2"] == 160


def test_below_the_budget_it_is_stock(engine):
    prompts = [random_prompt(n) for n in (40, 180)]
    stock = engine(block_size=32).generate(prompts)
    assert engine(**INT4, block_size=32).generate(prompts) == stock


def test_a_store_that_would_hold_no_more_is_refused():
    config = EvictionConfig.from_dict({"policy": "keydiff", "store_dtype": "int8"})
    with pytest.raises(ValueError, match="store_dtype='int8' would hold 8 tokens in a page of 16.*use 'model'"):
        StateLayout.of(config, 16, 16, torch.bfloat16)
