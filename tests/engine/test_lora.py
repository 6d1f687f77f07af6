"""LoRA adapters with eviction: an adapter changes weights only, and no request sees the pages of another adapter."""

import pytest
from engine import random_prompt
from tiny_models import make_adapter
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

# The default's store, in int8; the long prompts overflow it.
EVICT = {"policy": "momentkv", "budget_tokens": 128, "store_dtype": "auto"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return LoRARequest("adapter", 1, str(make_adapter(tmp_path_factory.mktemp("adapter"))))


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
    ours = answers(engine(**options, **EVICT), adapter)
    assert ours["100+"] != ours["100"] and ours["600+"] != ours["600"], "the adapter was meant to change tokens"
    assert {k: ours[k] for k in ("100", "100+")} == {k: stock[k] for k in ("100", "100+")}
    cached = engine(**options, **EVICT, enable_prefix_caching=True, max_num_batched_tokens=64)
    for _ in range(2):
        assert answers(cached, adapter) == ours
    assert cached.cached_tokens["600+"] > 384, "its own state was meant to be found the second time"
