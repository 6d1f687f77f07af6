"""The simulator against the engine: every policy's score but one, schedule, correction and observation, on the same tokens."""

import pytest
import torch
from engine import random_prompt
from quality.simulate import Eviction, SimulatedModel

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import schedule_of
from momentkv_vllm.policies import names

pytestmark = pytest.mark.engine

PAGE, PROMPT, NEW = 16, 300, 40
OTHERS = {
    "momentkv, off": {"policy": "momentkv", "correction": "off"},
    "momentkv, first": {"policy": "momentkv", "correction": "first", "moment_dtype": "int8"},
    "momentkv, full": {"policy": "momentkv", "prefill": "full", "observation_tokens": 20},
    "snapkv, chunked": {"policy": "snapkv", "prefill": "chunked", "correction": "zeroth"},
    "paper, chunked": {"policy": "paper", "prefill": "chunked"},
}
# A token's key has the same norm wherever it stands in the first layer, so among the few words of this model rounding decides
# what knorm keeps.
KINDS = {**{name: {"policy": name} for name in names() if name != "knorm"}, **OTHERS}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_engines(engine, models, kind):
    """Budget 128: some fifteen events, in the prompt or after it. What was decoded is read again by the simulator."""
    values = {"budget_tokens": 128, **KINDS[kind]}
    e = engine(models(seed=1), **values, block_size=PAGE)
    prompts = [random_prompt(PROMPT, seed) for seed in (1, 2)]
    names = [e.add(prompt, NEW, logprobs=1) for prompt in prompts]
    said, log_probs = {}, {}
    while e.vllm.has_unfinished_requests():
        for output in (o for o in e.step() if o.finished):
            answer = output.outputs[0]
            said[output.request_id] = list(answer.token_ids)
            log_probs[output.request_id] = [p[t].logprob for t, p in zip(answer.token_ids, answer.logprobs)]
    config = EvictionConfig.from_dict(values)
    model = SimulatedModel(models(seed=1))
    head_dim = model.model.config.head_dim
    how = Eviction.of(config, schedule_of(config, PAGE, head_dim, torch.float32), PROMPT)
    ids = torch.tensor([prompt + said[name] for prompt, name in zip(prompts, names)])
    found = model.log_probs(ids, slice(PROMPT - 1, PROMPT + NEW - 1), how)
    mine = found.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    torch.testing.assert_close(mine, torch.tensor([log_probs[name] for name in names]), atol=2e-3, rtol=0)
    full = model.log_probs(ids, slice(PROMPT - 1, PROMPT + NEW - 1), None).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    assert (mine - full).abs().max() > 0.02, "eviction must matter here"
