"""Keys rounded by what a model's queries are, in a real vLLM engine: what is measured, where, and that it is what the simulator does."""

import os

import pytest
import torch
from engine import random_prompt
from measured_heads import runner_of
from real_model import folder
from research.simulate import SimulatedModel
from simulated import log_probabilities
from transformers import AutoTokenizer
from vllm.model_executor.layers.attention import Attention

from momentkv_vllm.attention.measuring import text_of
from momentkv_vllm.attention.sample_text import LEAST_TOKENS, TOKENS, text_tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAGE, NEW = 16, 40
OURS = {"policy": "momentkv", "budget_tokens": 128, "store_dtype": "int4", "head_budgets": "equal",
        "key_rounding": "measured"}  # fmt: skip


def feedbacks(e):
    layers = runner_of(e).compilation_config.static_forward_context.values()
    return [x.impl.feedback for x in layers if isinstance(x, Attention)]


@pytest.mark.parametrize("store_dtype", ["int4", "int8"])
def test_the_engine_does_what_the_simulator_does(engine, models, store_dtype):
    """But where the last bit of a number has decided about all codes of a key."""
    values = {**OURS, "store_dtype": store_dtype}
    found = log_probabilities(engine, models(seed=1), values, PAGE, prompt_tokens=700, new=NEW)
    error = (found.simulator - found.engine).abs()
    assert error.median() < 2e-3 and error.quantile(0.9) < 0.05
    assert (found.simulator - found.full).abs().quantile(0.9) > 0.05, "eviction must matter here"


def test_what_is_measured_is_the_models_own(engine, models):
    """By transformers, which knows nothing of vLLM's layers: the same second moments, up to a rounding."""
    path = models(seed=1)
    e = engine(path, **OURS, block_size=PAGE, max_num_batched_tokens=96)
    assert text_of(runner_of(e)) is None, "its tokenizer knows a few words: random tokens are read"
    for ours, theirs in zip(feedbacks(e), SimulatedModel(path).feedback, strict=True):
        assert ours.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(folder.find() is None, reason=folder.WHY_NOT)
def test_a_real_tokenizer_knows_the_text():
    tokenizer = AutoTokenizer.from_pretrained(folder.find())
    assert len(text_tokens(tokenizer, 8192)) == TOKENS and len(text_tokens(tokenizer, 300)) == 300
    assert text_tokens(tokenizer, LEAST_TOKENS - 1) is None and text_tokens(None, 8192) is None


def test_answers_do_not_depend_on_chunk_size_or_batch_and_rounding_matters(engine, models):
    """But for near ties: the last bit of one number decides about all codes of its key."""
    prompts, options = [random_prompt(n) for n in (700, 900)], {**OURS, "model": models(seed=1), "block_size": PAGE}
    alone = [said(engine(**options), [p])[0] for p in prompts]
    together = said(engine(**options, max_num_batched_tokens=160), prompts)
    nearest = engine(**options | {"key_rounding": "nearest"})
    assert feedbacks(nearest) == [None] * len(feedbacks(nearest))
    apart = [distance(a, b) for a, b in zip(alone, said(nearest, prompts), strict=True)]
    for a, b, other in zip(alone, together, apart, strict=True):
        assert distance(a, b) < 5e-3 < other


def said(e, prompts):
    """Of each prompt: {token: log-probability} of the likeliest ones for the first token behind it."""
    names, found = [e.add(p, 1, logprobs=20) for p in prompts], {}
    while e.vllm.has_unfinished_requests():
        found |= {o.request_id: o.outputs[0].logprobs[0] for o in e.step() if o.finished}
    return [{token: p.logprob for token, p in found[name].items()} for name in names]


def distance(a, b):
    """The largest difference of what both name."""
    assert len(a.keys() & b.keys()) >= 10
    return max(abs(a[token] - b[token]) for token in a.keys() & b.keys())


def test_where_keys_cannot_be_measured(engine, models):
    with pytest.raises(ValueError, match="key_rounding='measured'.*store_dtype 'model'.*use 'auto' or 'nearest'"):
        engine(models(), **{**OURS, "store_dtype": "model"}, block_size=PAGE)


@pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_interpreter.py")
def test_engines_of_triton_and_of_the_reference_say_the_same(engine, models):
    """But for near ties, as above."""
    options, prompts = {**OURS, "model": models(seed=1), "block_size": PAGE}, [random_prompt(460)]
    found = {kernels: said(engine(**options, kernels=kernels), prompts)[0] for kernels in ("reference", "triton")}
    nearest = said(engine(**options | {"key_rounding": "nearest", "kernels": "reference"}), prompts)[0]
    assert distance(*found.values()) < 5e-3 < distance(found["reference"], nearest)
