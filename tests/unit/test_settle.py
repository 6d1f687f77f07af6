"""What "auto" becomes: told to every process, said in the start-up line, a function of model and kernels."""

import logging
from dataclasses import replace

import pytest
import torch
from engine import random_prompt
from vllm import EngineArgs

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels import FAMILIES, select
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kv_spec import StateLayout, settled
from momentkv_vllm.vllm_seams.settle import settled_config

AUTO = {"policy": "momentkv", "budget_tokens": 256}


def config_of(model, **values):
    carrier = {"kv_eviction": AUTO | values}
    return (
        EngineArgs(model=str(model), additional_config=carrier).create_engine_config().additional_config["kv_eviction"]
    )


def test_every_process_is_told(models):
    told = config_of(models())
    assert (told["store_dtype"], told["run_tokens"]) == ("int4", 8)
    assert EvictionConfig.from_dict(told) == settled(EvictionConfig.from_dict(told), 16, 32, torch.float32)


def test_kernels_without_a_quantised_store_keep_the_models(models, monkeypatch, caplog):
    monkeypatch.setattr(select("reference"), "limits", Limits(stores=False))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    told = config_of(models(), kernels="reference")
    assert (told["store_dtype"], told["run_tokens"]) == ("model", 1)
    assert "store_dtype auto is model, not int4" in caplog.text
    with pytest.raises(ValueError, match="kernel family 'reference' cannot run here: it knows no store of int4"):
        config_of(models(), kernels="reference", store_dtype="int4")


@pytest.mark.parametrize(
    ("kernels", "serves", "want", "why"),
    [
        ("auto", "triton", ("int4", 8, "measured", "measured"), None),
        ("cuda", "cuda", ("model", 1, "equal", "nearest"), "store_dtype 'model'"),
    ],
)
def test_on_a_gpu(models, monkeypatch, kernels, serves, want, why):
    """The default is served by the family that `auto` takes there, as on a CPU. The CUDA C++ family keeps the model's numbers, of
    which nothing is measured."""
    from vllm.platforms import current_platform

    vllm_config = EngineArgs(model=str(models()), block_size=16).create_engine_config()
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    for name in ("triton", "cuda"):
        family = next(f for f in FAMILIES if f.name == name)
        monkeypatch.setattr(family, "objections", lambda: [], raising=False)
        monkeypatch.setattr(family, "limits", replace(family.limits, head_sizes=None, dtypes=None))
    told = settled_config(vllm_config, EvictionConfig.from_dict(AUTO | {"kernels": kernels}))
    assert (told.store_dtype, told.run_tokens, told.head_budgets, told.key_rounding) == want
    shape = StateLayout.of(told, 16, 64, torch.bfloat16).cache_shape(torch.bfloat16)
    assert select(kernels, "cuda", shape).name == serves
    for setting in ("head_budgets", "key_rounding") if why else ():
        with pytest.raises(ValueError, match=f"{setting}='measured'.*{why}"):
            settled_config(vllm_config, replace(told, **{setting: "measured"}))


@pytest.mark.parametrize(
    ("policy", "head_dim", "dtype", "want"),
    [
        ("momentkv", 64, torch.bfloat16, ("int4", 8)),
        ("momentkv", 16, torch.bfloat16, ("int4", 8)),
        ("momentkv", 80, torch.float16, ("int4", 8)),
        ("momentkv", 64, torch.float32, ("int8", 8)),
        ("streamingllm", 64, torch.bfloat16, ("model", 1)),
        ("keydiff", 64, torch.bfloat16, ("model", 1)),
    ],
)
def test_of_a_policy_and_a_model(policy, head_dim, dtype, want):
    """A published method stays what was published; where only sinks are kept, a store has nothing to hold."""
    config = settled(EvictionConfig.from_dict({"policy": policy}), 16, head_dim, dtype)
    assert (config.store_dtype, config.run_tokens) == want
    assert settled(config, 16, head_dim, dtype) == config


def test_what_the_user_sets_stays():
    def layout(**values):
        return StateLayout.of(EvictionConfig.from_dict(AUTO | values), 16, 64, torch.bfloat16)

    schedule = layout().schedule
    assert (schedule.store_page_tokens, schedule.run_tokens, schedule.window_pages) == (56, 8, 2)
    assert layout(run_tokens=16).schedule.run_tokens == 16
    assert layout(window_tokens=64).schedule.window_pages == 5
    assert layout(store_dtype="int8").schedule.store_page_tokens == 24
    exact = layout(store_dtype="model").schedule
    assert (exact.store_page_tokens, exact.run_tokens, exact.window_pages) == (0, 1, 8)


@pytest.mark.parametrize("value", [0, 4, 8.0, True])
def test_run_tokens_that_are_none(value):
    with pytest.raises(ValueError, match="run_tokens=.* is not one of 1, 8, 16"):
        EvictionConfig.from_dict(AUTO | {"run_tokens": value})


@pytest.mark.engine
def test_the_default_evicts(engine):
    """A float32 page of this model holds 48 or more tokens in int8."""
    e = engine(policy="momentkv", budget_tokens=64, store_dtype="auto")
    prompts = [random_prompt(n) for n in (900, 300, 60)]
    tokens = e.generate(prompts, 40)
    schedule = e.manager.schedule
    assert schedule.is_packed and schedule.evicted_tokens(schedule.boundary_column(900)) > 500
    assert max(e.peak_pages.values()) <= schedule.peak_pages(256)
    assert (
        engine(policy="momentkv", budget_tokens=64, store_dtype="auto", max_num_batched_tokens=48).generate(prompts, 40)
        == tokens
    )
