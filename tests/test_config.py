"""The configuration object: legal values, defaults, and messages that name key, value, range and way out."""

import pytest

from momentkv_vllm.config import POLICY_DEFAULTS, EvictionConfig
from momentkv_vllm.policies import POLICIES


def test_two_keys_are_a_complete_configuration():
    config = EvictionConfig.from_dict({"policy": "momentkv", "budget_tokens": 2048})
    assert config == EvictionConfig("momentkv", 2048)
    assert config.active and EvictionConfig.from_dict(config.to_dict()) == config


def test_nothing_means_off():
    assert not EvictionConfig.from_dict(None).active
    assert not EvictionConfig.from_dict({}).active


def test_policies_and_defaults_name_the_same_policies():
    assert set(POLICIES) == set(POLICY_DEFAULTS)


def test_a_policy_replaces_defaults_but_not_what_the_user_says():
    assert EvictionConfig.from_dict({"policy": "paper"}).prefill == "full"
    assert EvictionConfig.from_dict({"policy": "paper", "prefill": "chunked"}).prefill == "chunked"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "lru"}, ["policy", "'lru'", "momentkv"]),
        ({"policy": "momentkv", "budget": 5}, ["'budget'", "budget_tokens"]),
        ({"policy": "momentkv", "budget_tokens": 0}, ["budget_tokens", "0", ">= 1"]),
        ({"policy": "momentkv", "budget_tokens": True}, ["budget_tokens", "True"]),
        ({"policy": "momentkv", "budget_tokens": 10.5}, ["budget_tokens", "10.5"]),
        ({"policy": "momentkv", "sink_tokens": -1}, ["sink_tokens", "-1", ">= 0"]),
        ({"policy": "momentkv", "prefill": "lazy"}, ["prefill", "'lazy'", "chunked", "full"]),
        ({"policy": "momentkv", "correction": "second"}, ["correction", "'second'", "zeroth"]),
        ({"policy": "momentkv", "moment_dtype": "int4"}, ["moment_dtype", "'int4'", "int8", "bfloat16"]),
        ({"policy": "momentkv", "kernels": "metal"}, ["kernels", "'metal'", "auto", "reference"]),
        ({"budget_tokens": 64}, ["without 'policy'", "--kv-eviction"]),
        ([1], ["not a JSON object"]),
    ],
)
def test_refusals_name_key_value_and_range(values, words):
    with pytest.raises(ValueError) as error:
        EvictionConfig.from_dict(values)
    for word in words:
        assert word in str(error.value)
