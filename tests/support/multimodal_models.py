"""Tiny random-weight models that hear or see; Idefics 3 prepares images by Pillow, Qwen2.5-VL by torchvision."""

from pathlib import Path

import numpy as np
import torch
from family_settings import COMMON, FAMILIES, mrope
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
from transformers.models.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_audio import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
IMAGE = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
VISION = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
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


def make_qwen_image_model(folder: Path) -> Path:
    """A tiny Qwen2.5-VL: a token for each 28 x 28 pixels, and positions of three numbers."""
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": COMMON["hidden_size"],
        "patch_size": PATCH, "window_size": TILE, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=COMMON | {"rope_parameters": rope}, image_token_id=4, video_token_id=5,
        vision_start_token_id=6, vision_end_token_id=7, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    sharpen(model.model.language_model)
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 448 * 448}
    images, videos = Qwen2VLImageProcessor(size=pixels), Qwen2VLVideoProcessor(size=pixels)
    Qwen2_5_VLProcessor(images, word_tokenizer(VISION), videos).save_pretrained(folder)
    return folder


def _make_qwen3_image_model(folder: Path, config: type, model_class: type, text: dict, vision: dict) -> Path:
    """A token for each 32 x 32 pixels."""
    torch.manual_seed(0)
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": COMMON["hidden_size"],
        "num_position_embeddings": 256,
    }  # fmt: skip
    settings = config(
        vision_config=tower | vision, text_config=COMMON | text, image_token_id=4, video_token_id=5, vision_start_token_id=6,
        vision_end_token_id=7,
    )  # fmt: skip
    model = model_class(settings)
    sharpen(model.model.language_model)
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=16)
    videos = Qwen3VLVideoProcessor(size=pixels)
    Qwen3VLProcessor(images, word_tokenizer(VISION), videos).save_pretrained(folder)
    return folder


def make_deepstack_model(folder: Path) -> Path:
    """A tiny Qwen3-VL: what both layers of its tower see is added to the text's layers."""
    text = FAMILIES["Qwen3"].settings | mrope(4, 6, 6)
    return _make_qwen3_image_model(
        folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, text, {"deepstack_visual_indexes": [0, 1]}
    )


def make_hybrid_image_model(folder: Path) -> Path:
    """A tiny Qwen3.5."""
    text = FAMILIES["Qwen3.5"].settings | mrope(11, 11, 10, partial_rotary_factor=0.25)
    return _make_qwen3_image_model(folder, Qwen3_5Config, Qwen3_5ForConditionalGeneration, text, {})


def _words(count: int) -> str:
    return " ".join(f"w{7 * i % 80}" for i in range(count))


def heard(seconds: float, words: int, seed: int = 0) -> dict:
    """A prompt: noise, then the same words for every seed."""
    noise = np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype(np.float32) / 10
    return {"prompt": f"{' '.join(AUDIO)} {_words(words)}", "multi_modal_data": {"audio": [(noise, 16000)]}}


def seen(pixels: int, words: int, seed: int = 0, image: str = "<image>") -> dict:
    """A prompt: a square of noise, which `image` stands for, then the same words for every seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    return {"prompt": f"<s> {image} {_words(words)}", "multi_modal_data": {"image": Image.fromarray(noise)}}
