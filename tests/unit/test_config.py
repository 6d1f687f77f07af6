"""The configuration object: legal values, defaults, and messages that name key, value, range and way out."""

import json

import pytest

from momentkv_vllm.budget_classes import class_number, salted
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.page_schedule import build_schedule
from momentkv_vllm.policies import find, names


def test_two_keys_are_a_complete_configuration():
    config = EvictionConfig.from_dict({"policy": "momentkv", "budget_tokens": 2048})
    assert config == EvictionConfig("momentkv", 2048)
    assert config.active and EvictionConfig.from_dict(config.to_dict()) == config


def test_nothing_means_off():
    assert not EvictionConfig.from_dict(None).active
    assert not EvictionConfig.from_dict({}).active


@pytest.mark.parametrize("policy", names())
def test_every_policy_is_a_configuration_with_its_own_defaults(policy):
    config = EvictionConfig.from_dict({"policy": policy})
    assert config.policy_class is find(policy)
    assert config == EvictionConfig(policy, **find(policy).defaults)


@pytest.mark.parametrize("key", ["window_tokens", "retire_tokens"])
@pytest.mark.parametrize("auto", [None, "auto", 0])
def test_auto_follows_from_the_budget(key, auto, caplog):
    """Half of the budget and 1/32 of it; 0 was how to say so."""
    with caplog.at_level("WARNING", logger="vllm.momentkv_vllm.config"):
        config = EvictionConfig.from_dict({"policy": "momentkv", "budget_tokens": 2048, key: auto})
    assert getattr(config, key) is None and config == EvictionConfig("momentkv", 2048)
    assert [f"{key}=0" in r.getMessage() for r in caplog.records] == [True] * (auto == 0)
    schedule = build_schedule(config, 16, 1, False)
    assert (schedule.window_pages, schedule.retire_pages) == (64, 4)
    assert EvictionConfig.from_dict(config.to_dict()) == config


def test_no_sinks_is_legal_and_no_warning(caplog):
    assert EvictionConfig("momentkv", sink_tokens=0).sink_tokens == 0 and not caplog.records


def test_auto_goes_before_a_policy_s_own_number():
    assert EvictionConfig.from_dict({"policy": "snapkv"}).window_tokens == 32
    assert EvictionConfig.from_dict({"policy": "snapkv", "window_tokens": "auto"}).window_tokens is None


def test_a_policy_replaces_defaults_but_not_what_the_user_says():
    assert EvictionConfig.from_dict({"policy": "paper"}).prefill == "full"
    assert EvictionConfig.from_dict({"policy": "paper", "prefill": "chunked"}).prefill == "chunked"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "lru"}, ["policy", "'lru'", "momentkv"]),
        ({"policy": ["momentkv"]}, ["policy", "['momentkv']", "momentkv"]),
        ({"policy": "momentkv", "budget": 5}, ["'budget'", "budget_tokens"]),
        ({"policy": "momentkv", "budget_tokens": 0}, ["budget_tokens", "0", ">= 1"]),
        ({"policy": "momentkv", "budget_tokens": True}, ["budget_tokens", "True"]),
        ({"policy": "momentkv", "budget_tokens": 10.5}, ["budget_tokens", "10.5"]),
        ({"policy": "momentkv", "sink_tokens": -1}, ["sink_tokens", "-1", ">= 0"]),
        ({"policy": "momentkv", "window_tokens": -1}, ["window_tokens", "-1", ">= 1", "'auto'"]),
        ({"policy": "momentkv", "retire_tokens": False}, ["retire_tokens", "False", ">= 1", "'auto'"]),
        ({"policy": "momentkv", "prefill": "lazy"}, ["prefill", "'lazy'", "chunked", "full"]),
        ({"policy": "momentkv", "correction": "second"}, ["correction", "'second'", "zeroth"]),
        ({"policy": "momentkv", "moment_dtype": "int4"}, ["moment_dtype", "'int4'", "int8", "bfloat16"]),
        ({"policy": "momentkv", "store_dtype": "fp8"}, ["store_dtype", "'fp8'", "auto, model, int8, int4"]),
        ({"policy": "momentkv", "run_tokens": 8.0}, ["run_tokens", "8.0", "1, 8, 16"]),
        ({"policy": "momentkv", "run_tokens": True}, ["run_tokens", "True", "1, 8, 16"]),
        ({"policy": "momentkv", "state_share": 1.5}, ["state_share", "1.5", "0 to 1"]),
        ({"policy": "momentkv", "state_share": float("nan")}, ["state_share", "nan", "0 to 1"]),
        ({"policy": "momentkv", "state_share": True}, ["state_share", "True", "0 to 1"]),
        ({"policy": "momentkv", "state_interval_tokens": -1}, ["state_interval_tokens", "-1", ">= 0"]),
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


@pytest.mark.parametrize(
    "budgets",
    [
        "small=1024,large=4096,exact=off",
        {"small": 1024, "large": 4096, "exact": "off"},
        {"small": "1024", "large": 4096, "exact": None},
        ["small=1024", "large=4096", "exact=off"],
    ],
)
def test_classes_are_written_in_several_ways(budgets):
    config = EvictionConfig.from_dict({"policy": "momentkv", "budgets": budgets, "window_tokens": 64})
    assert config.class_names == ("small", "large", "exact") and config.budget_tokens == 1024
    small, large, exact = config.classes
    assert small.config == EvictionConfig("momentkv", 1024, window_tokens=64) and small.evicts
    assert large.config == EvictionConfig("momentkv", 4096, window_tokens=64) and large.evicts
    assert not exact.evicts
    assert EvictionConfig.from_dict(config.to_dict()) == config and hash(config)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_classes_by_number():
    config = EvictionConfig.from_dict({"policy": "momentkv", "budgets": "off, 4096,256"})
    assert config.class_names == ("off", "4096", "256") and config.budget_tokens == 4096
    assert config.default_page_tokens == 16, "the smallest class decides"
    one = EvictionConfig("momentkv", 2048)
    assert one.class_names == ("2048",) and one.classes[0].config == one


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ("1024,1024", "twice"),
        ("off", "evict nothing"),
        ("1024,many", "'many' in the budgets"),
        ("a=0", "neither a number of tokens from 1 nor 'off'"),
        ({"a": True}, "neither a number"),
        ({"a b": 1024}, "no name of a class"),
        (7, "no list and no map"),
    ],
)
def test_classes_that_are_none(budgets, words):
    with pytest.raises(ValueError, match=words):
        EvictionConfig.from_dict({"policy": "momentkv", "budgets": budgets})


def test_a_budget_beside_classes_must_be_their_first():
    values = {"policy": "momentkv", "budgets": "off,512"}
    assert EvictionConfig.from_dict({**values, "budget_tokens": 512}).class_names == ("off", "512")
    with pytest.raises(ValueError, match="budget_tokens=1024 contradicts budgets, whose first number is 512"):
        EvictionConfig.from_dict({**values, "budget_tokens": 1024})


def test_the_class_of_a_request():
    names = ("small", "256", "off")
    asked = [None, {}, {"other": 1}, {"kv_budget": "small"}, {"kv_budget": 256}, {"kv_budget": "off"}]
    assert [class_number(names, x) for x in asked] == [0, 0, 0, 0, 1, 2]
    with pytest.raises(ValueError, match="kv_budget='big' is not one of small, 256, off; leave it out for small"):
        class_number(names, {"kv_budget": "big"})
    salts = [salted(salt, names, number) for salt in (None, "user", "kv_budget=off ") for number in range(3)]
    assert len(set(salts)) == len(salts) and salts[0] is None and salts[3] == "user"
