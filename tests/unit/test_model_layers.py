"""Windows that hide nothing, pages of several sizes, kernels that cannot serve a model: told before the engine starts."""

import logging

import pytest
import torch
from configured import changed_model, config_of
from engine import Engine
from model_families import make_config, make_model
from vllm.config import set_current_vllm_config
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm_names import unify_kv_cache_spec_page_size

from momentkv_vllm.attention.cpu_backend import MomentKVImpl
from momentkv_vllm.endpoint import summary
from momentkv_vllm.fp8 import kv_numbers
from momentkv_vllm.kernels import FAMILIES, select
from momentkv_vllm.kernels.limits import CacheShape, Limits
from momentkv_vllm.model_layers import full_layers, has_windows


@pytest.fixture
def mistral(models, tmp_path):
    """`mistral(window)`: the tiny Llama's folder as a model all of whose layers have that window."""

    def make(window):
        return changed_model(
            tmp_path / str(window),
            models(),
            model_type="mistral",
            architectures=["MistralForCausalLM"],
            sliding_window=window,
        )

    return make


@pytest.mark.parametrize(("window", "page_size"), [(2047, 32), (2048, 16), (262144, 16)])
def test_a_window_as_long_as_the_longest_sequence_is_none(mistral, window, page_size, caplog):
    """Nothing that windows rule out is refused then, and a line says so."""
    model = mistral(window)
    logger = logging.getLogger("vllm.momentkv_vllm.vllm_seams.engine_args")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    config = config_of(model, max_model_len=2048)
    logger.removeHandler(caplog.handler)
    assert config.cache_config.block_size == page_size
    said = f"the sliding window of {window} tokens hides nothing with --max-model-len 2048"
    assert (said in caplog.text) == (page_size == 16)
    if page_size == 16:
        config_of(model, max_model_len=2048, disable_hybrid_kv_cache_manager=True)
        config_of(model, max_model_len=2048, pipeline_parallel_size=2)


def test_windows_of_layers_that_do_not_slide_are_none(tmp_path):
    """Qwen2 writes a window into its configuration whatever its layers do."""
    config = config_of(make_config("Qwen2, late windows", tmp_path))
    assert config.model_config.get_sliding_window() == 64 and not has_windows(config.model_config)


def test_windows_stay_where_layers_differ_in_their_heads(tmp_path):
    """All layers that evict have pages of one shape: Gemma 4's sliding layers could not be among them."""
    config = config_of(make_config("Gemma 4", tmp_path), max_model_len=64)
    assert has_windows(config.model_config) and config.cache_config.block_size == 32


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "page_size", "page_bytes"),
    [
        ("Gemma 4", 32, 1 * 32 * 2 * (64 + 64) * 4),
        ("Gemma 4 31B", 64, 1 * 64 * 1 * (64 + 64) * 4),
        ("Gemma 4 E", 32, 1 * 32 * 2 * (64 + 64) * 4),
        ("Llama 4", 32, 1 * 32 * 2 * (32 + 32) * 4),
        ("Llama 4, short context", 32, 1 * 32 * 2 * (32 + 32) * 4),
        ("Phi-4-mini", 16, 2 * 16 * 2 * (64 + 64) * 4),
        ("Gemma 3", 32, 2 * 32 * 2 * (32 + 32) * 4),
        ("Gemma 3, short context", 16, 4 * 16 * 2 * (32 + 32) * 4),
    ],
)
def test_pages_of_layers_that_evict(engine, tmp_path, name, page_size, page_bytes):
    """Layers x tokens x KV heads x (key and value) x float32; the endpoint, which sees no layer, tells the same schedule."""
    e = engine(make_model(name, tmp_path), policy="momentkv", budget_tokens=256, max_model_len=2048)
    spec = e.manager.kv_cache_spec
    assert (spec.block_size, spec.schedule.page_size, spec.page_bytes) == (page_size, page_size, page_bytes)
    told = summary(e.vllm.vllm_config)["schedule"]
    assert told["page_size"] == page_size and told["first_event"] == 256
    assert told["store_pages"] == spec.schedule.store_pages and told["moment_pages"] == spec.schedule.moment_pages


@pytest.mark.engine
def test_vllm_may_change_the_page_size_and_the_schedule_follows(engine):
    """It does so for models whose layers need pages of different bytes (vllm/v1/core/kv_cache_utils.py)."""
    spec = engine(policy="momentkv", budget_tokens=384, block_size=32, store_dtype="model").manager.kv_cache_spec

    def beside(heads):
        other = SlidingWindowSpec(
            block_size=32, num_kv_heads=heads, head_size=spec.head_size, dtype=spec.dtype, sliding_window=64
        )
        return unify_kv_cache_spec_page_size({"full": spec, "sliding": other})["full"]

    assert spec.copy_with_new_block_size(32) == beside(spec.num_kv_heads) == spec
    wide = beside(2 * spec.num_kv_heads)
    assert wide == spec.copy_with_new_block_size(64)
    assert (wide.schedule.page_size, wide.schedule.budget_pages, wide.schedule.first_event_tokens) == (64, 6, 384)
    assert wide.page_bytes == 2 * spec.page_bytes
    assert wide.cacheable_tokens == 320, "384 less the 8 observed queries, in whole pages of 64"
    with pytest.raises(ValueError, match=r"budget_tokens=384 is too small: with pages of 128 tokens the least is 512"):
        beside(4 * spec.num_kv_heads)
    with pytest.raises(ValueError, match="cannot read padded pages.*serve without --kv-eviction"):
        beside(spec.num_kv_heads + 1)


def test_a_budget_too_small_for_the_pages_that_vllm_makes(tmp_path):
    model = make_config("Gemma 4 31B", tmp_path)
    layers = full_layers(config_of(model))
    assert (layers.head_size, layers.page_ratio, layers.count, layers.others) == (64, 2.0, 1, 5)
    carrier = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 128}}
    with pytest.raises(ValueError, match=r"with pages of 64 tokens the least is 192 .*--block-size 32 is meant for"):
        config_of(model, additional_config=carrier)


@pytest.mark.parametrize(("name", "full", "sliding"), [("Gemma 3n", 1, 4), ("Gemma 4 E", 1, 5)])
def test_layers_that_read_the_cache_of_others_are_not_counted(tmp_path, name, full, sliding):
    """Of 10 layers 5 read, of 12 layers 6: the last ones."""
    layers = full_layers(config_of(make_config(name, tmp_path)))
    assert (layers.count, layers.others) == (full, sliding)


def test_gemma_4_is_refused_a_backend_only_if_the_user_names_it(tmp_path):
    """vLLM writes TRITON_ATTN into its configuration on any machine, a CPU does not read it."""
    model = make_config("Gemma 4", tmp_path)
    assert config_of(model).attention_config.backend.name == "TRITON_ATTN"
    config_of(model, attention_backend="CPU_ATTN")
    for named in ({"attention_backend": "TRITON_ATTN"}, {"attention_config": {"backend": "TRITON_ATTN"}}):
        with pytest.raises(ValueError, match="--attention-backend TRITON_ATTN"):
            config_of(model, **named)


LIMITS = [
    ("cpu", (512, 16, torch.float32), ""),
    ("cpu", (528, 16, torch.bfloat16), "head sizes that are multiples of 16 up to 512, this model has 528"),
    ("cpu", (72, 16, torch.bfloat16), "head sizes that are multiples of 16 up to 512, this model has 72"),
    ("cpu", (64, 24, torch.bfloat16), "pages of multiples of 16 tokens, not of 24"),
    ("cpu", (64, 32, torch.float64), "float32, bfloat16, float16, .* the KV cache is float64"),
    ("cpu", (64, 32, torch.float8_e4m3fn), ""),
    ("cpu", (64, 32, torch.float8_e5m2), ""),
    ("triton", (64, 32, torch.float8_e4m3fn), "float32, bfloat16, float16, the KV cache is float8_e4m3fn"),
    ("cuda", (64, 32, torch.float8_e5m2), "bfloat16, float16, the KV cache is float8_e5m2"),
    ("cuda", (256, 16, torch.bfloat16), ""),
    ("cuda", (512, 16, torch.bfloat16), "head sizes 64, 128, 256, this model has 512"),
    ("cuda", (128, 16, torch.float32), "bfloat16, float16, the KV cache is float32"),
    ("triton", (80, 48, torch.float16, "int8", 8, 50.0), ""),
    ("triton", (512, 16, torch.float16), "head sizes up to 256, this model has 512"),
    ("reference", (528, 24, torch.float64), ""),
]


@pytest.mark.parametrize(("family", "shape", "words"), LIMITS)
def test_families_say_what_they_cannot_serve(family, shape, words, monkeypatch):
    for each in FAMILIES:
        monkeypatch.setattr(each, "runs_on", lambda device: True)
        monkeypatch.setattr(each, "objections", lambda: [])
    if not words:
        assert select(family, "cpu", CacheShape(*shape)).name == family
        return
    with pytest.raises(ValueError, match=f"kernel family '{family}' cannot run here: it serves {words}; use 'auto'"):
        select(family, "cpu", CacheShape(*shape))
    assert select("auto", "cpu", CacheShape(*shape)).limits.objections(CacheShape(*shape)) == []


def test_the_cuda_kernels_refuse_capped_logits(monkeypatch):
    for each in FAMILIES:
        monkeypatch.setattr(each, "objections", lambda: [])
    with pytest.raises(
        ValueError, match="it knows no logit soft-capping yet, this model caps its logits at 50; use 'auto'"
    ):
        select("cuda", "cuda", CacheShape(128, 16, torch.float16, softcap=50.0))
    assert select("auto", "cuda", CacheShape(128, 16, torch.float16, softcap=50.0)).name == "triton"


@pytest.mark.parametrize("shape", [shape for family, shape, _ in LIMITS if family == "cpu"])
def test_the_cpu_kernels_refuse_what_they_say(shape):
    """The limits in Python are those of csrc/cpu/bindings.cpp."""
    head_size, page_size, dtype = shape
    kv = torch.zeros(2, 1, page_size, 2 * head_size, dtype=dtype)
    token = torch.ones(1, 1, head_size, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    slot = torch.tensor([page_size])
    if select("cpu").limits.objections(CacheShape(*shape)):
        with pytest.raises(RuntimeError):
            torch.ops.momentkv_cpu.write(kv, 1.0, 1.0, token, token, slot, None)
        return
    torch.ops.momentkv_cpu.write(kv, 1.0, 1.0, token, token, slot, None)
    assert kv[1].float().sum() == 2 * head_size


def test_a_named_family_is_refused_before_loading_and_auto_takes_another(models, tmp_path):
    model = changed_model(tmp_path / "m", models(), head_dim=520)
    carrier = {"policy": "momentkv", "budget_tokens": 256}
    config_of(model, additional_config={"kv_eviction": carrier})
    with pytest.raises(
        ValueError, match="kernel family 'cpu' cannot run here: it serves head sizes .* this model has 520"
    ):
        config_of(model, additional_config={"kv_eviction": carrier | {"kernels": "cpu"}})


@pytest.mark.engine
@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_layers_ask_too(engine, tmp_path, monkeypatch, kernels):
    """A configuration need not tell the head size of the layers that evict."""
    monkeypatch.setattr(select("cpu"), "limits", Limits(range(16, 33, 16)))
    monkeypatch.setattr("momentkv_vllm.vllm_seams.settle.settled_config", lambda _, config: config)
    model = make_model("Gemma 4", tmp_path)
    options = {"policy": "momentkv", "budget_tokens": 256, "max_model_len": 2048, "kernels": kernels}
    if kernels == "cpu":
        with pytest.raises(ValueError, match="this model has 64"):
            Engine(model, **options)
        return
    e = engine(model, **options)
    assert len(e.generate([list(range(4, 100)) * 4], 4)[0]) == 4


def test_a_layer_whose_kv_cache_is_not_what_was_expected(models):
    """vLLM may decide when it builds a layer, after the options were checked."""
    for given, kind, words in (
        ("auto", "fp8", "a KV cache of fp8 where bfloat16"),
        ("auto", "nvfp4", "a KV cache of nvfp4 where bfloat16"),
        ("fp8", "auto", "a KV cache of auto where float8_e4m3fn"),
    ):
        config = config_of(models(), kv_cache_dtype=given)
        with set_current_vllm_config(config), pytest.raises(ValueError, match=f"models with {words} was expected"):
            MomentKVImpl(4, 32, 1.0, 2, None, None, kind)
        with set_current_vllm_config(config):
            MomentKVImpl(4, 32, 1.0, 2, None, None, given)


def test_a_checkpoint_whose_kv_cache_is_fp8(models, tmp_path):
    """vLLM reads such a scheme when it builds the layers, and only where the user says "auto"."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    weights = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    model = changed_model(tmp_path / "m", models(), quantization_config=weights)
    found = config_of(model)
    assert kv_numbers(found) is torch.float8_e4m3fn and found.cache_config.block_size == 32
    assert kv_numbers(config_of(model, dtype="bfloat16", kv_cache_dtype="bfloat16")) is torch.bfloat16


def test_fp8_on_machines_and_models_that_vllm_cannot_serve_with_it(models, tmp_path, monkeypatch):
    narrow = changed_model(tmp_path / "m", models(), head_dim=80)
    with pytest.raises(
        ValueError, match="--kv-cache-dtype fp8 for heads of 80 numbers .* multiples of 32, also without"
    ):
        config_of(narrow, kv_cache_dtype="fp8")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="an fp8 KV cache on a CPU without AVX-512"):
        config_of(models(), kv_cache_dtype="fp8")


@pytest.mark.parametrize("family", ["triton", "cuda"])
def test_a_named_family_that_cannot_read_fp8_is_refused_before_loading(models, monkeypatch, family):
    kernels = next(f for f in FAMILIES if f.name == family)
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "objections", lambda: [])
    carrier = {"policy": "momentkv", "budget_tokens": 256, "kernels": family, "store_dtype": "model"}
    config_of(models(head_dim=64), dtype="bfloat16", additional_config={"kv_eviction": carrier})
    with pytest.raises(ValueError, match=f"{family!r} cannot run here: it serves .* the KV cache is float8_e4m3fn"):
        config_of(
            models(head_dim=64), dtype="bfloat16", kv_cache_dtype="fp8", additional_config={"kv_eviction": carrier}
        )


def test_a_kv_cache_of_another_type_than_the_model(models):
    with pytest.raises(ValueError, match="--kv-cache-dtype bfloat16 .only auto, i.e. the model's dtype"):
        config_of(models(), dtype="float32", kv_cache_dtype="bfloat16")
    config_of(models(), dtype="bfloat16", kv_cache_dtype="bfloat16")
