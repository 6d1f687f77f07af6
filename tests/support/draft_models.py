"""Drafters of tiny models: what their layers compute is known, so that it shows when their KV is not what it should be.

The models of `make_one_layer` and `make_mtp_model` have one layer and embeddings of unit size. EAGLE and MTP layers
get the embedding of the next token beside the model's hidden state; theirs take the embedding alone and have the model's own
weights, so they predict what the model does. They never see a sequence's first token, and so they err at times.
"""

import json
from pathlib import Path

import torch
import transformers
from family_settings import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, sharpen

SETTINGS = COMMON | {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 32, "max_position_embeddings": 8192}


def _save(folder: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def _make(folder: Path, settings: transformers.PretrainedConfig) -> Path:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    sharpen(model)
    rows = model.get_input_embeddings().weight.data
    rows[0] = rows[1].flip(0)  # of padding: zeros have no size
    rows.div_(rows.square().mean(1, keepdim=True).sqrt())
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_one_layer(folder: Path, **settings: int) -> Path:
    """A Llama of one layer; settings: other ones of it."""
    return _make(folder, transformers.LlamaConfig(**SETTINGS | settings))


def make_windowed(folder: Path, model: Path) -> Path:
    """A Granite that computes what the Llama `model` of one layer does: three layers with a window before it add nothing."""
    weights, config = _read(model)
    types = ["sliding_attention"] * 3 + ["full_attention"]
    of_layer = {k: x for k, x in weights.items() if ".layers.0." in k}
    weights = {k: x for k, x in weights.items() if k not in of_layer}
    for layer, kind in enumerate(types):
        for k, x in of_layer.items():
            adds = kind == "sliding_attention" and ("o_proj" in k or "down_proj" in k)
            weights[k.replace(".0.", f".{layer}.")] = torch.zeros_like(x) if adds else x.clone()
    more = {
        "architectures": ["GraniteSWAForCausalLM"], "model_type": "granite_swa", "num_hidden_layers": 4, "layer_types": types,
        "sliding_window": 64, "attention_sinks": False, "attention_multiplier": config["head_dim"] ** -0.5,
    }  # fmt: skip
    return _save(folder, weights, config | more)


def make_doubled(folder: Path, model: Path) -> Path:
    """A Llama that computes what `model` does, with each of its KV heads twice."""
    weights, config = _read(model)
    size = config["head_dim"]
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (-1, size)).repeat_interleave(2, 0).flatten(0, 1)
    return _save(folder, weights, config | {"num_key_value_heads": 2 * config["num_key_value_heads"]})


def make_wide(folder: Path, model: Path) -> Path:
    """A Llama that computes what `model` does, with zeros between the numbers of its heads. Every second pair of numbers turns as
    fast as a pair of half as many."""
    weights, config = _read(model)
    size = config["head_dim"]
    for name, x in weights.items():
        if "self_attn" not in name:
            continue
        into = 1 if "o_proj" in name else 0
        x = x.unflatten(into, (-1, size))
        wide = torch.zeros(*x.shape[: into + 1], 2 * size, *x.shape[into + 2 :])
        wide[(slice(None),) * (into + 1) + (slice(0, None, 2),)] = x
        weights[name] = wide.flatten(into, into + 1) * (2**0.5 if "q_proj" in name else 1)
    return _save(folder, weights, config | {"head_dim": 2 * size})


def make_noisy(folder: Path, model: Path, noise: float = 0.02) -> Path:
    """A draft model: `model` with `noise` standard deviations of each matrix added to it."""
    weights, config = _read(model)
    random = torch.Generator().manual_seed(0)
    for x in weights.values():
        if x.dim() > 1:
            x += noise * x.std() * torch.randn(x.shape, generator=random)
    return _save(folder, weights, config)


def make_eagle(folder: Path, model: Path) -> Path:
    """An EAGLE head of the Llama `model`, of the form of vLLM's EagleLlamaForCausalLM."""
    weights, config = _read(model)
    size = config["hidden_size"]
    head = {k.removeprefix("model."): x for k, x in weights.items() if ".layers.0." in k and "input_layernorm" not in k}
    head["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    return _save(folder, head, config)


def make_eagle3(folder: Path, model: Path) -> Path:
    """An EAGLE3 head of the Llama `model`, of the form of vLLM's Eagle3LlamaForCausalLM, which sees one hidden state. Its drafts are
    as good as random."""
    weights, config = _read(model)
    size = config["hidden_size"]
    head = {k.replace("model.layers.0.", "midlayer."): x for k, x in weights.items() if ".layers.0." in k}
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"midlayer.self_attn.{name}.weight"
        head[key] = torch.cat([head[key], torch.zeros_like(head[key])], 1)
    head |= {
        "fc.weight": torch.eye(size),
        "midlayer.hidden_norm.weight": torch.ones(size),
        "norm.weight": torch.ones(size),
        "lm_head.weight": weights["lm_head.weight"],
    }
    more = {"architectures": ["LlamaForCausalLM"], "eagle_aux_hidden_state_layer_ids": [0], "num_aux_hidden_states": 1}
    return _save(folder, head, config | more)


def make_mtp_model(folder: Path) -> Path:
    """A GLM-4.5 of one layer with a layer for multi-token prediction in its checkpoint."""
    settings = SETTINGS | FAMILIES["GLM-4.5"].settings | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    _make(folder, transformers.Glm4MoeConfig(**settings))
    weights, config = _read(folder)
    size, layer = config["hidden_size"], "model.layers.1."
    weights |= {k.replace("model.layers.0.", layer): x.clone() for k, x in weights.items() if ".layers.0." in k}
    weights |= {
        f"{layer}enorm.weight": torch.ones(size),
        f"{layer}hnorm.weight": torch.ones(size),
        f"{layer}eh_proj.weight": torch.cat([torch.eye(size), torch.zeros(size, size)], 1),
        f"{layer}shared_head.norm.weight": torch.ones(size),
        f"{layer}shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{layer}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    return _save(folder, weights, config)
