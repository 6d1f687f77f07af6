"""The bounded KV cache spec, given to every layer that attends to all tokens of a sequence; layers with a window keep vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.model_layers import hides_tokens
from momentkv_vllm.refuse import WITHOUT, refuse

WINDOW_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Specs of layers that vLLM serves, in our pool: they attend to a part of a sequence and hold no more than that."""


@dataclass(frozen=True)
class StepRows:
    """Of a step's rows in order: tokens that are known at its end, drafts that it checks included, and lengths of prompts."""

    committed: Sequence[int]
    prompts: Sequence[int]


class EvictingBackend:
    """For an AttentionBackend; stands before vLLM's class in the bases. With eviction off, specs stay vLLM's."""

    loading: ClassVar[VllmConfig | None] = None
    """Config of the model whose layers were built last in this process: a mailbox between two of vLLM's calls.

    Written by `serving`, which `EvictingImpl.__init__` (layer.py) asks for every layer while the model is built. Read by
    `customize_spec` alone, which vLLM calls for every layer after loading, with no config in reach
    (vllm/v1/worker/gpu_model_runner.py, get_kv_cache_spec). A process that builds two models builds and asks for them one after
    the other; a draft model's own config is not written."""

    step_rows: ClassVar[StepRows] = StepRows((), ())
    """Of the step that the model itself has computed last: a mailbox between the builder of its metadata and that of a drafter in
    the same process, whose passes follow it and whose metadata has lost what a row has committed and how long its prompt is."""

    row_classes: ClassVar[Sequence[int]] = ()
    """Numbers of the budget classes of the next step's rows, which builders' metadata does not tell: a mailbox between the model
    runner (vllm_seams/cpu_runner.py), which writes it before every step, and the builders, which it calls then."""

    @staticmethod
    def serving(built: VllmConfig) -> VllmConfig:
        """The config of the model that is served, of which or of whose draft model a layer is being built with `built`."""
        drafts = built.speculative_config
        if drafts is None or built.model_config is not drafts.draft_model_config:
            EvictingBackend.loading = built
        return EvictingBackend.loading

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Called for every layer's spec by both model runners; full attention layers get the bounded one, layers with a
        window hold no more than that anyway. A layer that asks what one token takes (a page of one) is told."""
        loading = EvictingBackend.loading
        config = EvictionConfig.from_vllm(loading) if loading else EvictionConfig()
        full = _full_spec(spec, loading) if config.active and spec.block_size > 1 else None
        return spec if full is None else MomentKVSpec.of(full, config, loading, _page_bytes(loading))


def require_bounded_spec(spec: AttentionSpec, config: EvictionConfig, layer_names: list[str]) -> None:
    """Raises RuntimeError if layers would be served without eviction."""
    if not isinstance(spec, MomentKVSpec):
        refuse(
            f"--kv-eviction {config.policy} is on, but layers {layer_names[:2]}... have the KV cache spec "
            f"{type(spec).__name__} instead of MomentKVSpec: they would be served without eviction",
            "remove the plugin that replaced it",
            WITHOUT,
            error=RuntimeError,
        )


def leave_to_vllm(vllm_config: VllmConfig, config: EvictionConfig, layer_names: list[str]) -> None:
    """Layers with one of WINDOW_SPECS do not evict; the part of a layer that is ours does not see all kinds of windows.
    Raises ValueError for a model none of whose layers evicts."""
    for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
        layer.impl.config = None
    if not _evicting_layers(vllm_config):
        refuse(
            f"--kv-eviction {config.policy}: every layer of this model has a sliding window and holds no more than that: "
            f"there is nothing to evict"
        )


def shares_caches(vllm_config: VllmConfig) -> bool:
    """Whether layers of the loaded model read the cache of another one."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    return any(layer.kv_sharing_target_layer_name is not None for layer in layers)


def _full_spec(spec: AttentionSpec, vllm_config: VllmConfig) -> FullAttentionSpec | None:
    """The spec of a layer that attends to all tokens of a sequence, as one with a window that hides none does; else None."""
    if type(spec) is FullAttentionSpec:
        return spec
    if type(spec) is not SlidingWindowSpec or hides_tokens(spec.sliding_window, vllm_config.model_config):
        return None
    common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
    # Layers with windows choose pages of their own (vllm/model_executor/layers/attention/attention.py).
    return FullAttentionSpec(**common | {"block_size": vllm_config.cache_config.block_size})


def _evicting_layers(vllm_config: VllmConfig) -> list[FullAttentionSpec]:
    """Of the layers of the loaded model that evict, each in a cache of its own, a drafter's among them: what they attend to."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    own = (layer for layer in layers if layer.kv_sharing_target_layer_name is None)
    ours = (layer for layer in own if issubclass(layer.get_attn_backend(), EvictingBackend))
    specs = (_full_spec(layer.get_kv_cache_spec(vllm_config), vllm_config) for layer in ours)
    return [spec for spec in specs if spec is not None]


def _page_bytes(vllm_config: VllmConfig) -> int:
    """Of a page over all layers that evict, of all pipeline stages, of which a process loads one; with several, every layer of
    the model does, and they are alike (vllm_seams/refusals.py)."""
    specs = _evicting_layers(vllm_config)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return specs[0].page_size_bytes * vllm_config.model_config.get_total_num_hidden_layers()
    return sum(spec.page_size_bytes for spec in specs)
