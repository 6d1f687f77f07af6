"""What --kv-eviction does with a model family, on tiny random-weight members: their checkpoints."""

from pathlib import Path

import torch
import transformers
from family_settings import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, sharpen


def make_config(name: str, folder: Path) -> Path:
    """The tiny member of a family without its weights."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**COMMON | family.settings, architectures=[family.model_class])
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_model(name: str, folder: Path, dtype: str = "") -> Path:
    """The tiny member of a family, made once, with attention sharp enough that a wrong KV cache changes its tokens."""
    if (folder / "config.json").exists():
        return folder
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**COMMON | family.settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    sharpen(model)
    if config.tie_word_embeddings:  # or every token would predict itself
        model.get_input_embeddings().weight.data.mul_(0.1)
    model.to(getattr(torch, dtype or family.dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


SEEING = {"Gemma3TextConfig": "Gemma3Config", "Gemma4TextConfig": "Gemma4Config"}
"""Configurations of published checkpoints, which have other parts beside the text model, by that of the text model."""


def make_seeing_model(name: str, folder: Path, **text) -> Path:
    """The tiny member of a family in a checkpoint of the published class, without the weights of its other parts.

    text: other settings of the text model."""
    make_model(name, folder)
    family = FAMILIES[name]
    settings = {"text_config": COMMON | family.settings | text, "vision_config": {"num_hidden_layers": 1}}
    published = getattr(transformers, SEEING[family.config])(**settings)
    published.architectures = [SEEING[family.config].replace("Config", "ForConditionalGeneration")]
    published.save_pretrained(folder)
    weights = folder / "model.safetensors"
    parts = {k.replace("model.", "model.language_model.", 1): v for k, v in load_file(weights).items()}
    save_file(parts, weights, metadata={"format": "pt"})
    return folder
