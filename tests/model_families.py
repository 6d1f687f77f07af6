"""Tiny random-weight models of many families, and what --kv-eviction does with each: the table in the README."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY, save_tokenizer, sharpen

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = {"num_hidden_layers": 4, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """A model class of vLLM with the settings of its tiny member.

    Attributes:
        config: name of the configuration class in transformers.
        settings: what differs from COMMON.
        special: what is special about its attention, for the table.
        refused: words of the refusal; empty for families that are served.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    special: str = ""
    refused: str = ""


FAMILIES = {
    "Llama": Family("LlamaConfig"),
    "Mistral": Family("MistralConfig", {"sliding_window": None}),
    "Mistral 0.1": Family("MistralConfig", {"sliding_window": 64}, "every layer slides", "nothing to evict"),
    "Qwen2": Family("Qwen2Config", special="bias"),
    "Qwen3": Family("Qwen3Config", {"head_dim": 32}, "query and key norms"),
    "Phi": Family("PhiConfig", {"hidden_size": 320}, "partial RoPE, head size 80"),
    "Phi-3": Family("Phi3Config", {"hidden_size": 384, "sliding_window": None}, "head size 96"),
    "Gemma": Family("GemmaConfig", {"head_dim": 256}, "head size 256"),
    "Gemma 2": Family(
        "Gemma2Config", SLIDING | {"head_dim": 32}, "soft-capped logits, sliding-window layers", "soft-capping"
    ),
    "Gemma 3": Family("Gemma3TextConfig", SLIDING | {"head_dim": 32}, "sliding-window layers beside full ones"),
    "OLMo 2": Family("Olmo2Config", special="norms of whole rows"),
    "Granite": Family("GraniteConfig", {"attention_multiplier": 0.1}, "scale of its own"),
    "StableLM": Family("StableLmConfig", special="partial RoPE"),
    "OPT": Family("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 128}, "learned positions"),
    "Mixtral": Family("MixtralConfig", EXPERTS | {"sliding_window": None}, "experts"),
    "Qwen3-MoE": Family("Qwen3MoeConfig", EXPERTS | {"head_dim": 32}, "experts"),
    "GPT-OSS": Family(
        "GptOssConfig", SLIDING | EXPERTS | {"head_dim": 64}, "experts, attention sinks, sliding-window layers"
    ),
    "BLOOM": Family("BloomConfig", {"n_head": 4, "n_layer": 2}, "ALiBi", "ALiBi"),
}


def table() -> str:
    """The README's table of families."""
    rows = ["| family | special | with `--kv-eviction` |", "|---|---|---|"]
    for name, family in FAMILIES.items():
        rows.append(f"| {name} | {family.special} | {'refused: ' + family.refused if family.refused else 'served'} |")
    return "\n".join(rows)


def make_model(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The tiny member of a family, made once, with attention sharp enough that a wrong KV cache changes its tokens."""
    if (folder / "config.json").exists():
        return folder
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**COMMON | family.settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    sharpen(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
