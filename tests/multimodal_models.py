"""Tiny random-weight models that hear or see, whose processors need no torchvision (the lock for CPUs has none)."""

from pathlib import Path

import numpy as np
import torch
from family_settings import COMMON
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import sharpen, word_tokenizer
from transformers import LlamaConfig, Qwen2Config, WhisperFeatureExtractor
from transformers.models.idefics3 import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_audio import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)

AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
IMAGE = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TILES = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
TILE, PATCH = 112, 14
"""Pixels. A tile is (112 / 14 / 2)^2 = 16 tokens; an image of up to 4 x 4 tiles is read whole as well."""


def make_audio_model(folder: Path) -> Path:
    """A tiny Qwen2-Audio: 25 tokens a second of sound."""
    torch.manual_seed(0)
    encoder = Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16
    )
    config = Qwen2AudioConfig(audio_config=encoder, text_config=Qwen2Config(**COMMON), audio_token_index=4)
    model = Qwen2AudioForConditionalGeneration(config)
    sharpen(model.model.language_model)
    model.save_pretrained(folder)
    # transformers 5.19 writes a `model.` too many, which neither it nor vLLM reads back.
    weights = folder / "model.safetensors"
    renamed = {k.replace("model.model.", "model."): v for k, v in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16), word_tokenizer(AUDIO)).save_pretrained(folder)
    return folder


def make_image_model(folder: Path) -> Path:
    """A tiny Idefics 3 (SmolVLM's architecture)."""
    torch.manual_seed(0)
    vision = Idefics3VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
    )
    config = Idefics3Config(
        vision_config=vision, text_config=LlamaConfig(**COMMON), image_token_id=4, scale_factor=2, pad_token_id=0
    )
    model = Idefics3ForConditionalGeneration(config)
    sharpen(model.model.text_model)
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE})
    Idefics3Processor(images, word_tokenizer(IMAGE + TILES), image_seq_len=16).save_pretrained(folder)
    return folder


def _words(count: int) -> str:
    return " ".join(f"w{7 * i % 80}" for i in range(count))


def heard(seconds: float, words: int, seed: int = 0) -> dict:
    """A prompt: noise, then the same words for every seed."""
    noise = np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype(np.float32) / 10
    return {"prompt": f"{' '.join(AUDIO)} {_words(words)}", "multi_modal_data": {"audio": [(noise, 16000)]}}


def seen(pixels: int, words: int, seed: int = 0) -> dict:
    """A prompt: a square of noise, then the same words for every seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    return {"prompt": f"<s> <image> {_words(words)}", "multi_modal_data": {"image": Image.fromarray(noise)}}
