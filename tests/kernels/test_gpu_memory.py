"""What lies beside vLLM's pages is taken off the GPU memory that it gives to them."""

from types import SimpleNamespace

import pytest
import torch
from layer_sides import Side, config_of
from vllm.v1.worker.gpu_worker import Worker
from vllm_names import get_kv_cache_config_from_groups, get_kv_cache_groups

from momentkv_vllm.attention.cuda_backend import CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.plugin import register
from momentkv_vllm.vllm_seams.gpu import patch_gpu_worker

GRANTED = 50 << 20


def allocated(config, available, layers=3):
    """(bytes of `layers` caches as vLLM sizes them, bytes that their layers keep beside, bytes of one page more)"""
    side = Side(config, CudaMomentKVBackend, CudaMomentKVImpl, CudaMomentKVMetadataBuilder)
    spec = side.builder.kv_cache_spec
    specs = {f"layer {i}": spec for i in range(layers)}
    runner = SimpleNamespace(get_kv_cache_spec=lambda: specs)
    config.cache_config.kv_cache_layout = "LBHNC"
    given = Worker.determine_available_memory(SimpleNamespace(model_runner=runner)) if available is None else available
    pool = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), given)
    cache = torch.empty(pool.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size, dtype=spec.dtype)
    what = config.additional_config["kv_eviction"].get("policy")
    observes = side.impl.policy.observes
    beside = Observed.of(side.impl.view_of(cache), observes.what).data.nbytes if observes else 0
    assert what and cache.nbytes == spec.page_size_bytes * pool.num_blocks
    return layers * cache.nbytes, layers * beside, layers * (spec.page_size_bytes + beside // pool.num_blocks)


@pytest.mark.parametrize(
    ("settings", "beside"),
    [({}, True), ({"policy": "expected_attention"}, True), ({"store_dtype": "int4", "run_tokens": 8}, True), ({"policy": "knorm"}, False)],
)  # fmt: skip
def test_pages_and_what_is_observed_fill_what_was_granted(models, monkeypatch, settings, beside):
    """Not more, and not a page less."""
    register()
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: GRANTED)
    monkeypatch.setattr(Worker, "_momentkv_patched", False, raising=False)
    patch_gpu_worker()
    patched = Worker.determine_available_memory
    patch_gpu_worker()
    assert Worker.determine_available_memory is patched
    config = config_of(models(), **settings)
    pages, observed, one_more = allocated(config, None)
    assert pages + observed <= GRANTED < pages + observed + one_more
    assert (observed > 0) is beside
    stock_pages, stock_observed, _ = allocated(config_of(models(), **settings), GRANTED)
    assert (stock_pages + stock_observed > GRANTED) is beside, "as it was before the patch"
