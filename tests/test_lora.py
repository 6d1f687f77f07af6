"""LoRA adapters with eviction: an adapter changes weights only, and no request sees the pages of another adapter."""

import json

import pytest
import torch
from engine import random_prompt
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.engine

EXACT = {"policy": "momentkv", "budget_tokens": 384, "moment_dtype": "float32"}
RANK = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter of the tiny Llama's queries and values (hidden size 64, 4 and 2 heads of 32)."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 128), ("v_proj", 64)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, 64, generator=random)
            weights[f"{key}.lora_B.weight"] = torch.randn(width, RANK, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    return LoRARequest("adapter", 1, str(folder))


def answers(e, adapter) -> dict:
    """Tokens of a short and a long prompt, each with and without the adapter, one after the other."""
    tokens = {}
    for length in (100, 600):
        for lora in (None, adapter):
            name = f"{length}{'+' if lora else ''}"
            settings = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
            e.vllm.add_request(name, {"prompt_token_ids": random_prompt(length)}, settings, lora_request=lora)
            tokens |= e.run()
    return tokens


def test_adapters_evict_like_the_base_model(engine, models, adapter):
    options = {"model": models(seed=1), "enable_lora": True, "max_lora_rank": 8}
    stock = answers(engine(**options, block_size=32), adapter)
    ours = answers(engine(**options, **EXACT), adapter)
    assert ours["100+"] != ours["100"] and ours["600+"] != ours["600"], "the adapter was meant to change tokens"
    assert {k: ours[k] for k in ("100", "100+")} == {k: stock[k] for k in ("100", "100+")}
    cached = engine(**options, **EXACT, enable_prefix_caching=True, max_num_batched_tokens=64)
    for _ in range(2):
        assert answers(cached, adapter) == ours
    assert cached.cached_tokens["600+"], "its own prefix was meant to be found the second time"
