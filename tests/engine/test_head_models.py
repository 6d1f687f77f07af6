"""Heads with budgets of their own in models of every kind: what the pass sees is what stock vLLM computes, and tokens do not depend
on how prompts are cut."""

import pytest
import torch
from engine import Engine, random_prompt
from measured_heads import capacities, runner_of
from multimodal_models import make_qwen_image_model
from quick import quick

from momentkv_vllm.attention.head_reach import Probe
from momentkv_vllm.attention.measuring import STEP_TOKENS, hidden_states, probed, tokens_for

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("inspected_here")]

MEASURED = {"policy": "momentkv", "head_budgets": "measured", "run_tokens": 8, "store_dtype": "int8", "budget_tokens": 128,
            "max_model_len": 2048}  # fmt: skip
# Windows, capped logits, sinks, chunked attention, Mamba, gated DeltaNet, convolutions, shared caches; with another block where a
# state needs it.
KINDS = {
    "Gemma 3": {},
    "Gemma 2": {},
    "GPT-OSS": {},
    "Llama 4": {},
    "OLMo 3": {},
    "Granite 4 hybrid": {"budget_tokens": 256},
    "Qwen3-Next": {"budget_tokens": 512, "store_dtype": "int4", "dtype": "bfloat16"},
    "LFM2": {"budget_tokens": 256},
    "Gemma 4 E": {},
}


def log_probabilities_of_pass(e: Engine) -> torch.Tensor:
    """Of each token of the pass but the first one."""
    runner = runner_of(e)
    ids = tokens_for(runner)
    with probed(runner, len(ids)):
        hidden = torch.cat(hidden_states(runner, ids))
    logits = runner.model.compute_logits(hidden).float().log_softmax(-1)
    return logits[:-1].gather(1, ids[1:, None]).squeeze(1)


def stock_log_probabilities(e: Engine, ids: list[int]) -> torch.Tensor:
    e.add(ids, 1, prompt_logprobs=0)
    while e.vllm.has_unfinished_requests():
        for output in e.step():
            found = output.prompt_logprobs
    return torch.tensor([each[token].logprob for each, token in zip(found[1:], ids[1:], strict=True)])


def compared(engine, folder, dtype="float32", **options) -> None:
    e = engine(folder, **MEASURED | options, dtype=dtype)
    steps = {"max_num_batched_tokens": STEP_TOKENS}  # stock's LFM2 answers otherwise in others
    ids = tokens_for(runner_of(e)).tolist()
    want = stock_log_probabilities(engine(folder, dtype=dtype, max_model_len=2048, block_size=32, **steps), ids)
    got = log_probabilities_of_pass(e)
    assert want.std() > 0.05, "a model to which all tokens are alike proves nothing"
    error = (got - want).abs()
    assert error.max() < 1e-3 if dtype == "float32" else error.mean() < 0.03
    assert capacities(e)


@pytest.mark.parametrize("name", KINDS)
def test_the_pass_is_what_stock_computes(engine, family_model, name):
    compared(engine, family_model(name), **KINDS[name])


def answers(e: Engine, prompts: list[list[int]]) -> list[tuple[list[int], float]]:
    """Tokens and the logarithm of their probability."""
    for prompt in prompts:
        e.add(prompt, 24, logprobs=0)
    found = {}
    while e.vllm.has_unfinished_requests():
        for output in e.step():
            found[output.request_id] = list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob
    return [found[name] for name in sorted(found)]


# Stock's own tokens depend on the steps with LFM2 and in bfloat16.
@pytest.mark.parametrize(
    "name",
    quick(
        ["Gemma 3", "GPT-OSS", "Granite 4 hybrid"],
        ["Gemma 3", "Gemma 2", "GPT-OSS", "Llama 4", "Granite 4 hybrid", "Gemma 4 E"],
    ),
)
def test_tokens_do_not_depend_on_steps_or_batch(engine, family_model, name, monkeypatch):
    if name in ("Llama 4", "Gemma 4 E"):  # one layer evicts, whose two heads reach as far
        monkeypatch.setattr(Probe, "reach", property(lambda self: torch.tensor([0.1, 0.9])))
    options, prompts = MEASURED | KINDS[name], [random_prompt(n, seed=2) for n in (300, 700, 1100)]
    one = engine(family_model(name), **options, max_num_batched_tokens=512)
    alone = [answers(one, [p])[0] for p in prompts]
    many = engine(family_model(name), **options, max_num_batched_tokens=64)
    assert capacities(one) == capacities(many) and torch.tensor(capacities(one)).unique().numel() > 1
    together = answers(many, prompts)
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    chances, likely = (torch.tensor([chance for _, chance in found]) for found in (together, alone))
    torch.testing.assert_close(chances, likely, atol=2e-3, rtol=0)
    equal = answers(engine(family_model(name), **options | {"head_budgets": "equal"}), prompts)
    # Beyond what steps may change.
    assert max(abs(a - b) for (_, a), (_, b) in zip(equal, alone, strict=True)) > 4e-3, "what heads hold must matter"


def test_text_of_a_model_that_sees(engine, tmp_path):
    compared(engine, make_qwen_image_model(tmp_path), budget_tokens=256)
