"""What --kv-eviction does with a model family, on tiny random-weight members: their checkpoints."""

from pathlib import Path

import torch
import transformers
from family_settings import COMMON, FAMILIES, TEXT_ONLY
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


def make_seeing_model(name: str, folder: Path, **text) -> Path:
    """The tiny member of a published class (TEXT_ONLY) without the weights of its other parts.

    text: other settings of the text model."""
    published = TEXT_ONLY[name]
    make_model(published.family, folder)
    settings = COMMON | FAMILIES[published.family].settings | published.settings | text
    config = getattr(transformers, published.config)(text_config=settings, vision_config={"num_hidden_layers": 1})
    config.architectures = [name.split(" ")[0]]
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    parts = {k.replace("model.", published.prefix, 1): v for k, v in load_file(weights).items()}
    if not published.prefix.startswith("model."):
        parts = {k.replace("lm_head.", "language_model.lm_head."): v for k, v in parts.items()}
    save_file(parts, weights, metadata={"format": "pt"})
    return folder
