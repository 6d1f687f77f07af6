"""What --kv-eviction does with a model family, on tiny random-weight members: their checkpoints."""

from pathlib import Path
from typing import Any

import torch
import transformers
from family_settings import COMMON, FAMILIES, TEXT_ONLY, Published
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, sharpen


def make_config(name: str, folder: Path) -> Path:
    """The tiny member of a family without its weights."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**COMMON | family.settings, architectures=[family.model_class])
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_model(name: str, folder: Path, dtype: str = "", **settings: Any) -> Path:
    """The tiny member of a family, made once, with attention sharp enough that a wrong KV cache changes its tokens.

    settings: other ones than the family's."""
    if (folder / "config.json").exists():
        return folder
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**COMMON | family.settings | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    sharpen(model)
    if config.tie_word_embeddings:  # or every token would predict itself
        model.get_input_embeddings().weight.data.mul_(0.1)
    model.to(getattr(torch, dtype or family.dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_seeing_model(name: str, folder: Path, **text) -> Path:
    """The tiny member of a published class (TEXT_ONLY), without the weights of its other parts where vLLM does without.

    text: other settings of the text model."""
    published = TEXT_ONLY[name]
    make_model(published.family, folder)
    parts = {"text_config": COMMON | FAMILIES[published.family].settings | published.settings | text} | published.parts
    thinks = published.before == "thinker."  # beside one that talks, which vLLM does not run
    config = getattr(transformers, published.config)(**{"thinker_config": parts} if thinks else parts)
    if published.whole:
        model = getattr(transformers, published.whole)(config.thinker_config if thinks else config)
        sharpen(model.get_decoder())
        model.save_pretrained(folder)
    config.architectures = [name.split(" ")[0]]
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({_named(k, published): v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return folder


def _named(weight: str, published: Published) -> str:
    """As in a checkpoint of the published class."""
    if published.before or published.whole:
        return published.before + weight
    return weight.replace("model.", "model.language_model.", 1)
