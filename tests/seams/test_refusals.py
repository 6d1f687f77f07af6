"""Every option and model property that eviction cannot serve is refused before the engine starts, by name."""

import json
import logging
import shutil

import pytest
import transformers
from configured import EVICT, changed_model, config_of
from engine import Engine
from model_families import make_config
from tiny_models import save_tokenizer
from vllm import EngineArgs

from momentkv_vllm.block_manager.scheduler import AsyncMomentKVScheduler, MomentKVScheduler
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.environment import ALLOW_UNTESTED_VLLM
from momentkv_vllm.versions import PYTHON_CODE, TESTED_VLLM
from momentkv_vllm.vllm_seams import engine_args, refusals

LENGTHS_DECIDE = {
    "prefill 'full'": {"prefill": "full"},
    "prefill 'auto'": {"prefill": "auto"},
    "prefill_retire_tokens=64": {"prefill_retire_tokens": 64},
}
"""Settings with which the events of a request depend on the length of its prompt."""
pytestmark = pytest.mark.usefixtures("inspected_here")

STOCK_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kv_cache_dtype": "nvfp4"},
            ["--kv-cache-dtype nvfp4", "on a CPU fp8, fp8_e4m3, fp8_e5m2", "use --kv-cache-dtype auto"],
        ),
        ({"kv_cache_dtype": "fp8", "block_size": 16}, ["--block-size 16", "multiple of 32", "an fp8 KV cache"]),
        (
            {"kv_cache_dtype": "fp8_e5m2", "kv_cache_dtype_skip_layers": ["0"]},
            ["--kv-cache-dtype-skip-layers 0", "leave the option out"],
        ),
        ({"block_size": 24}, ["--block-size 24", "multiple of 16"]),
        (
            {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 512},
            ["--num-gpu-blocks-override 20", "--max-num-batched-tokens"],
        ),
        ({"kv_offloading_size": 1.0}, ["--kv-offloading-size"]),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, ["--kv-transfer-config"]),
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            ["pipeline parallelism", "--enforce-eager", "also without eviction"],
        ),
        ({"runner": "pooling", "convert": "embed"}, ["pooling"]),
        ({"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill", "leave the option out"]),
    ],
)
def test_options(models, options, words):
    with pytest.raises(ValueError) as error:
        config_of(models(), **options)
    for word in [*words, "--kv-"]:
        assert word in str(error.value)


@pytest.mark.parametrize("setting", LENGTHS_DECIDE)
def test_a_scheduler_that_would_not_read_a_longer_prompt_again(models, setting):
    """A session that has evicted and whose prompt grows: the schedule of the longer prompt is another one
    (tests/engine/test_sessions.py). A scheduler that derives from ours knows."""
    carried = {"kv_eviction": EVICT["kv_eviction"] | LENGTHS_DECIDE[setting]}
    with pytest.raises(
        ValueError, match=f"--scheduler-cls {STOCK_SCHEDULER} with {setting}.*use prefill 'chunked' without"
    ):
        config_of(models(), additional_config=carried, scheduler_cls=STOCK_SCHEDULER)
    own = type("Own", (MomentKVScheduler,), {})
    assert config_of(models(), additional_config=carried, scheduler_cls=own).scheduler_config.scheduler_cls is own


def test_a_scheduler_that_would_not_read_a_session_again(models):
    """With steps in flight it must in any case."""
    config = config_of(models(), scheduler_cls=STOCK_SCHEDULER)
    config.scheduler_config.async_scheduling = True
    eviction = EvictionConfig.from_vllm(config)
    with pytest.raises(ValueError, match=f"--scheduler-cls {STOCK_SCHEDULER} with --async-scheduling"):
        refusals.refuse_unsupported(config, eviction)
    config.scheduler_config.scheduler_cls = type("Own", (AsyncMomentKVScheduler,), {})
    refusals.refuse_unsupported(config, eviction)


def test_a_scheduler_that_would_not_end_steps_at_evictions(tmp_path):
    """Layers that share KV give every token's logits in such steps only."""
    model = make_config("Gemma 4 E", tmp_path)
    with pytest.raises(ValueError, match=f"--scheduler-cls {STOCK_SCHEDULER} for models with KV sharing"):
        config_of(model, scheduler_cls=STOCK_SCHEDULER)
    assert config_of(model).scheduler_config.scheduler_cls


def model_of(folder, source, config, architecture):
    """The tiny Llama's folder with config.json of another class's defaults."""
    changed = {"architectures": [architecture], "torch_dtype": "bfloat16"}
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(getattr(transformers, config)().to_dict() | changed, default=str))
    return folder


def test_sliding_window_models_get_pages_that_their_kernel_can_read(models, tmp_path):
    model = changed_model(
        tmp_path / "m", models(), model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64
    )
    assert config_of(models()).cache_config.block_size == 16
    assert config_of(model).cache_config.block_size == 32
    with pytest.raises(ValueError, match="--block-size 48 is not a multiple of 32"):
        config_of(model, block_size=48)
    with pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"):
        config_of(model, disable_hybrid_kv_cache_manager=True)
    with pytest.raises(ValueError, match="pipeline parallelism of models with sliding-window layers"):
        config_of(model, pipeline_parallel_size=2)


@pytest.mark.parametrize(
    ("name", "architecture", "words", "options"),
    [
        ("DeepseekV2Config", "DeepseekV2ForCausalLM", "MLA", {}),
        ("MambaConfig", "MambaForCausalLM", "attention-free", {}),
        ("JambaConfig", "JambaForCausalLM", "Mamba1 layers, which vLLM cannot run on a CPU", {}),
        ("WhisperConfig", "WhisperForConditionalGeneration", "encoder-decoder", {"max_model_len": 448}),
        ("PaliGemmaConfig", "PaliGemmaForConditionalGeneration", "read images in both directions", {}),
    ],
)
def test_model_families(models, tmp_path, name, architecture, words, options):
    """Only config.json is read: the refusal comes before any weight is loaded."""
    model = model_of(tmp_path / "m", models(), name, architecture)
    with pytest.raises(ValueError, match=words) as error:
        config_of(model, **options)
    assert "--kv-eviction momentkv does not support" in str(error.value)


def test_text_of_a_model_that_reads_images_in_both_directions(models, tmp_path):
    """The way out that its refusal names."""
    model = model_of(tmp_path / "m", models(), "PaliGemmaConfig", "PaliGemmaForConditionalGeneration")
    assert config_of(model, language_model_only=True).additional_config["kv_eviction"]


def test_alibi_layers_are_refused_when_the_model_is_built(tmp_path):
    config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="ALiBi; serve without --kv-eviction"):
        Engine(tmp_path, policy="momentkv", budget_tokens=512)


def test_too_small_a_budget_says_the_least_one(models):
    args = EngineArgs(
        model=str(models()), additional_config={"kv_eviction": {"policy": "momentkv", "budget_tokens": 32}}
    )
    with pytest.raises(ValueError, match=r"the least is 48 \(store 1 \+ moments 0 \+ window 2 pages"):
        args.create_engine_config()


def test_untested_vllm(models, monkeypatch):
    monkeypatch.delenv(ALLOW_UNTESTED_VLLM.name, raising=False)
    monkeypatch.setattr(refusals, "installed_vllm", lambda: "0.99.0")
    with pytest.raises(ValueError, match=r"0\.32\.0 \(its CPU build\), 0\.33\.0.*0\.99\.0 is installed") as error:
        config_of(models())
    assert ALLOW_UNTESTED_VLLM.name in str(error.value)
    monkeypatch.setenv(ALLOW_UNTESTED_VLLM.name, "1")
    assert config_of(models()).additional_config["kv_eviction"]["policy"] == "momentkv"


@pytest.mark.parametrize("version", TESTED_VLLM)
def test_a_release_that_was_tested_in_part_is_served_and_said(models, monkeypatch, caplog, version):
    for module in (refusals, engine_args):
        monkeypatch.setattr(module, "installed_vllm", lambda: version)
    with caplog.at_level(logging.WARNING, engine_args.logger.name):
        assert "kv_eviction" in config_of(models()).additional_config
    said = [r.getMessage() for r in caplog.records if "was tested" in r.getMessage()]
    assert said == ([] if version == "0.32.0" else [f"momentkv: vLLM {version} was tested in part: {PYTHON_CODE}"])


def test_defaults_are_chosen_only_where_the_user_was_silent(models):
    config = config_of(models())
    assert config.cache_config.block_size == 16 and config.cache_config.enable_prefix_caching
    assert config_of(models(), block_size=64, max_num_batched_tokens=128).cache_config.block_size == 64


def test_without_the_flag_the_config_is_stock(models):
    args = {"model": str(models()), "max_model_len": 2048}
    config = EngineArgs(**args).create_engine_config()
    stock = EngineArgs.create_engine_config.__wrapped__(EngineArgs(**args))
    assert config.cache_config == stock.cache_config and config.cache_config.enable_prefix_caching
    assert config.scheduler_config == stock.scheduler_config
    assert "kv_eviction" not in config.additional_config


def test_flags_and_additional_config_are_one_thing(models):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    line = f"--model {models()} --kv-eviction momentkv --kv-budget 512 --kv-eviction-config.window_tokens 64"
    args = EngineArgs.from_cli_args(parser.parse_args([*line.split(), "--kv-eviction-config.retire_tokens", "auto"]))
    carried = args.additional_config["kv_eviction"]
    assert carried["retire_tokens"] is None
    assert (carried["policy"], carried["budget_tokens"], carried["window_tokens"]) == ("momentkv", 512, 64)
    both = parser.parse_args((line + " --kv-eviction-config.budget_tokens 128").split())
    with pytest.raises(ValueError, match="contradicts"):
        EngineArgs.from_cli_args(both)


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("1024,4096,off", {"1024": 1024, "4096": 4096, "off": "off"}),
        ("small=1024,exact=off", {"small": 1024, "exact": "off"}),
    ],
)
def test_several_budgets_by_flag(models, text, budgets):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    line = f"--model {models()} --kv-eviction momentkv --kv-budget {text}"
    args = EngineArgs.from_cli_args(parser.parse_args(line.split()))
    carried = args.additional_config["kv_eviction"]
    assert (carried["budgets"], carried["budget_tokens"]) == (budgets, 1024)
    # A further API server process parses what the first one has left.
    assert EngineArgs.from_cli_args(parser.parse_args(line.split())).additional_config == args.additional_config
    with pytest.raises(ValueError, match="contradicts"):
        EngineArgs.from_cli_args(parser.parse_args([*line.split(), "--kv-eviction-config.budget_tokens", "512"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-budget", "1024,many"])


def test_several_budgets_need_our_scheduler_and_a_pool_for_the_largest(models):
    carried = {"kv_eviction": {"policy": "momentkv", "budgets": "256,1024"}}
    with pytest.raises(
        ValueError, match=r"several budgets \(256, 1024\), of which a request chooses; leave --scheduler-cls"
    ):
        config_of(models(), additional_config=carried, scheduler_cls=STOCK_SCHEDULER, async_scheduling=False)
    options = {"max_num_batched_tokens": 128, "max_model_len": 4096}
    with pytest.raises(ValueError, match="64 for --kv-budget 1024, the rest for a prefill step"):
        config_of(models(), additional_config=carried, num_gpu_blocks_override=60, **options)
    assert config_of(models(), additional_config=carried, num_gpu_blocks_override=80, **options)


def test_a_pool_too_small_for_an_exact_prompt(models):
    carrier = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256, "prefill": "auto"}}
    options = {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 60, "max_model_len": 4096}
    with pytest.raises(ValueError, match="a prompt of exact_prompt_tokens=1024; lower .*exact_prompt_tokens"):
        config_of(models(), additional_config=carrier, **options)
    carrier["kv_eviction"]["exact_prompt_tokens"] = 500
    assert config_of(models(), additional_config=carrier, **options)


@pytest.mark.parametrize(("family", "prefill"), [("Gemma 3", "auto"), ("LFM2", "chunked")])
def test_state_files_where_no_state_can_be(tmp_path, family, prefill):
    carrier = {**EVICT["kv_eviction"], "budget_tokens": 1024, "prefill": prefill, "state_folder": str(tmp_path)}
    with pytest.raises(ValueError, match="without states .*no hybrid model, and with 'auto' no layer with a window"):
        config_of(
            make_config(family, tmp_path / "model"),
            additional_config={"kv_eviction": carrier},
            enable_prefix_caching=True,
        )
