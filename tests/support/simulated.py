"""The same tokens in an engine and in the simulator."""

from typing import NamedTuple

import torch
from engine import random_prompt
from research.simulate import Eviction, SimulatedModel

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import StateLayout


class LogProbabilities(NamedTuple):
    """[2, new] of what an engine decoded after two prompts: its own, the simulator's, those with the full cache."""

    engine: torch.Tensor
    simulator: torch.Tensor
    full: torch.Tensor


def log_probabilities(engine, folder, values, page_size: int, prompt_tokens: int, new: int) -> LogProbabilities:
    """engine: the fixture; folder: of the model; values: of `EvictionConfig`. What was decoded is read again by the simulator."""
    values = {"store_dtype": "model", "key_rounding": "nearest"} | values
    e = engine(folder, **values, block_size=page_size)
    prompts = [random_prompt(prompt_tokens, seed) for seed in (1, 2)]
    names = [e.add(prompt, new, logprobs=1) for prompt in prompts]
    said, log_probs = {}, {}
    while e.vllm.has_unfinished_requests():
        for output in (o for o in e.step() if o.finished):
            answer = output.outputs[0]
            said[output.request_id] = list(answer.token_ids)
            log_probs[output.request_id] = [p[t].logprob for t, p in zip(answer.token_ids, answer.logprobs)]
    config, model = EvictionConfig.from_dict(values), SimulatedModel(folder)
    layout = StateLayout.of(config, page_size, model.model.config.head_dim, torch.float32)
    ids = torch.tensor([prompt + said[name] for prompt, name in zip(prompts, names)])

    def read(how):
        found = model.log_probs(ids, slice(prompt_tokens - 1, prompt_tokens + new - 1), how)
        return found.gather(-1, ids[:, prompt_tokens:, None]).squeeze(-1)

    how = Eviction.of(config, layout.schedule, prompt_tokens, layout.packed)
    return LogProbabilities(torch.tensor([log_probs[name] for name in names]), read(how), read(None))
