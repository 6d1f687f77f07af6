"""What --kv-eviction does with a model family, on tiny random-weight members: their checkpoints."""

from pathlib import Path

import torch
import transformers
from family_settings import COMMON, FAMILIES
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
