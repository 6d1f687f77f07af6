"""What vLLM could run in the place of what our hooks are in is refused, or not chosen, before the engine starts."""

import os

import pytest
from configured import config_of
from engine import Engine, random_prompt
from multimodal_models import make_image_model
from vllm import EngineArgs
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.metrics import RETIRED_PAGES
from momentkv_vllm.vllm_seams.bypasses import RUST_FRONTEND, V2_RUNNER
from momentkv_vllm.vllm_seams.refusals import refuse_unsupported


@pytest.fixture
def unset(monkeypatch):
    """The variable as it is for most users; later tests find it as it was."""
    monkeypatch.setenv(V2_RUNNER, "")
    monkeypatch.delenv(V2_RUNNER)


@pytest.fixture
def with_triton(monkeypatch):
    """A machine whose CPU Triton serves, as far as vLLM's choice of a runner goes."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)


def stock_config(model):
    return EngineArgs(model=str(model), max_model_len=2048).create_engine_config()


def test_vllm_would_choose_its_v2_runner_where_triton_works(models, unset, with_triton):
    """Also for an engine without eviction that follows one with it."""
    assert stock_config(models()).use_v2_model_runner
    assert not config_of(models()).use_v2_model_runner and os.environ[V2_RUNNER] == "0"
    assert stock_config(models()).use_v2_model_runner and V2_RUNNER not in os.environ


def test_what_the_user_chose_stays(models, monkeypatch, with_triton):
    monkeypatch.setenv(V2_RUNNER, "0")
    assert not config_of(models()).use_v2_model_runner
    assert not stock_config(models()).use_v2_model_runner and os.environ[V2_RUNNER] == "0"


def test_an_engine_evicts_where_triton_works(models, unset, with_triton):
    e = Engine(models(), policy="momentkv", budget_tokens=128)
    runner = e.vllm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, CPUModelRunner)
    e.generate([random_prompt(400)], 4)
    assert e.manager.metrics.values[RETIRED_PAGES, 0] > 0
    e.close()


def test_the_v2_runner_by_name(models, monkeypatch, with_triton):
    monkeypatch.setenv(V2_RUNNER, "1")
    with pytest.raises(ValueError, match=f"{V2_RUNNER}=1 on a CPU .only 0.* set {V2_RUNNER}=0, or serve without --kv-"):
        config_of(models())
    assert stock_config(models()).use_v2_model_runner


def test_the_v2_runner_that_another_option_asks_for(models, unset, with_triton):
    """vLLM then takes it whatever the variable says."""
    with pytest.raises(ValueError, match="does not support --watermark-config on a CPU .*leave the option out"):
        config_of(models(), watermark_config={"algorithm": "gumbel", "key": 7})


def test_the_v2_runner_after_all(models, unset, with_triton, monkeypatch):
    """vLLM may have read the variable before us, once for all."""
    config = config_of(models())
    monkeypatch.setenv(V2_RUNNER, "1")
    with pytest.raises(ValueError, match=f"V2 model runner on a CPU .{V2_RUNNER} is 1.*set {V2_RUNNER}=0 before"):
        refuse_unsupported(config, EvictionConfig.from_vllm(config))


class OurWorker(CPUWorker):
    """One that a user derives."""


class OtherWorker:
    """One that has nothing to do with vLLM's."""


def test_a_worker_that_is_not_vllms(models):
    assert config_of(models(), worker_cls=f"{__name__}.OurWorker").parallel_config.worker_cls
    with pytest.raises(ValueError, match="--worker-cls .*OtherWorker .*derive it from vLLM's"):
        config_of(models(), worker_cls=f"{__name__}.OtherWorker")


PRODUCER = {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}}, "backend_per_kind of full_attention"),
        ({"attention_config": {"use_non_causal": True}}, "use_non_causal"),
        ({"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "--ubatch-size 2.*leave both out"),
        ({"prefix_match_unit": 8}, "--prefix-match-unit 8, other than the page size of 16"),
    ],
)  # fmt: skip
def test_options(models, options, words):
    with pytest.raises(ValueError, match=f"--kv-eviction momentkv does not support .*{words}"):
        config_of(models(), **options)


def test_options_that_vllm_itself_ties_to_other_models(models):
    config = config_of(models())
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match="--enable-return-routed-experts"):
        refuse_unsupported(config, EvictionConfig.from_vllm(config))


@pytest.mark.parametrize("options", [{"mm_encoder_only": True}, {"ec_transfer_config": PRODUCER}])
def test_an_encoder_alone(tmp_path, options):
    """vLLM makes the first of the second."""
    with pytest.raises(ValueError, match="does not support --mm-encoder-only and --ec-transfer-config of a producer"):
        config_of(make_image_model(tmp_path), **options)


def test_a_front_end_that_is_no_python(models, monkeypatch):
    monkeypatch.setenv(RUST_FRONTEND, "1")
    with pytest.raises(ValueError, match=f"{RUST_FRONTEND}=1 .*unset {RUST_FRONTEND}"):
        config_of(models())
