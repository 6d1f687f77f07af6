"""What vLLM's ModelConfig tells about a model's attention layers before any of them is built."""

from dataclasses import dataclass
from typing import Any

_WINDOW_KEYS = (
    "sliding_window", "interleaved_sliding_window", "sliding_windows", "sliding_window_size", "attn_window_size",
)  # fmt: skip
"""Names that model configurations give to sliding windows: a number, or one per layer."""

_ATTENTION_TYPES = ("attention", "full_attention", "hybrid")
_STATE_TYPES = ("mamba", "linear_attention", "conv", "hybrid")
"""How configurations of models with states name their layers; "hybrid" is both in one (Zamba2)."""


def named_windows(model: Any) -> set[int]:
    """Every sliding window in tokens that the model's configuration names. Layers may have others; none if all of them are
    said to attend to everything."""
    types = getattr(model.hf_text_config, "layer_types", None)
    if types and all(kind == "full_attention" for kind in types):
        return set()
    values = [getattr(model.hf_text_config, key, None) for key in _WINDOW_KEYS]
    flat = [w for value in values for w in (value if isinstance(value, list | tuple) else [value])]
    return {w for w in flat if isinstance(w, int) and w > 0}


def hides_tokens(window: int | None, model: Any) -> bool:
    """Whether a layer with this window is served as one: a window at least as long as the longest sequence is none.

    It stays one where layers differ in their heads: those that evict have one shape of page."""
    return window is not None and (window < model.max_model_len or heads_differ(model))


def has_windows(model: Any) -> bool:
    """Whether the configuration tells of layers that do not evict: with a window that hides tokens, or attending in chunks of
    any length, which vLLM serves by a backend of their own."""
    return bool(model.attention_chunk_size) or any(hides_tokens(w, model) for w in named_windows(model))


def keeps_states(model: Any) -> bool:
    """Whether layers with a state (Mamba, gated DeltaNet, short convolutions) stand beside those that attend: vLLM then makes
    blocks as large as a state."""
    return bool(model.is_hybrid)


def sharing_layers(model: Any) -> int:
    """How many layers read the cache of an earlier one and have none of their own: the last ones (Gemma 3n, Gemma 4 E2B, E4B)."""
    return getattr(model.hf_text_config, "num_kv_shared_layers", None) or 0


@dataclass(frozen=True)
class FullLayers:
    """The layers that attend to all tokens in a cache of their own, as far as the configuration tells.

    Attributes:
        head_size: of keys.
        page_ratio: pages of the other layers have so many times the bytes of theirs, if more. vLLM gives all layers pages of
            the same bytes, and so these layers as many times the tokens.
        count, others: how many there are, and how many layers there are of the rarest other kind; 0 if not told.
        softcap: where they cap their logits; 0: nowhere.
    """

    head_size: int
    page_ratio: float = 1.0
    count: int = 0
    others: int = 0
    softcap: float = 0.0


def full_layers(vllm_config: Any) -> FullLayers:
    """Read from `layer_types` where there are any; otherwise every layer is taken for one of them."""
    model = vllm_config.model_config
    if keeps_states(model):
        return _beside_states(model)
    arch, types = model.model_arch_config, getattr(model.hf_text_config, "layer_types", None) or []
    types = types[: arch.total_num_hidden_layers - sharing_layers(model)]
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    softcap = getattr(model.hf_text_config, "attn_logit_softcapping", None) or 0.0
    if not full or not has_windows(model):
        return FullLayers(model.get_head_size(), softcap=softcap)
    numbers = [
        model.get_num_kv_heads(vllm_config.parallel_config, arch[i]) * arch[i].head_size for i in range(len(types))
    ]
    kinds = {kind: types.count(kind) for kind in types if kind != "full_attention"}
    return FullLayers(
        arch[full[0]].head_size,
        max(1.0, max(numbers) / numbers[full[0]]),
        len(full),
        min(kinds.values(), default=0),
        softcap,
    )


def has_mamba(model: Any) -> bool:
    """Whether the layers that keep states are of Mamba: their names in configurations do not tell, what these know of them does
    (gated DeltaNet has heads, a short convolution a length)."""
    others = ("linear_key_head_dim", "conv_L_cache")
    return keeps_states(model) and not any(hasattr(model.hf_text_config, key) for key in others)


def _beside_states(model: Any) -> FullLayers:
    text = model.hf_text_config
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    count, others = (sum(kind in kinds for kind in types) for kinds in (_ATTENTION_TYPES, _STATE_TYPES))
    return FullLayers(model.get_head_size(), 1.0, count, others)


def heads_differ(model: Any) -> bool:
    """Whether layers have KV heads of several sizes or numbers."""
    overrides = model.model_arch_config.per_layer_overrides or []
    return any({"head_size", "total_num_kv_heads"} & set(layer) for layer in overrides)
