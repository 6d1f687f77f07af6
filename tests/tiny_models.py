"""Small random-weight models made on the spot: real Hugging Face checkpoints with a word-level tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"


def word_tokenizer(special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Four special tokens, those of `special` from 4 on, then words w0, w1, ... up to VOCABULARY."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *special]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=list(special),
    )  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    """`word_tokenizer` with a chat template."""
    fast = word_tokenizer()
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def sharpen(model: torch.nn.Module) -> None:
    """Attention of random weights made sharp enough that a wrong KV cache changes the model's tokens."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                weight.mul_(8.0)
            elif weight.dim() >= 2:
                weight.mul_(3.0)
            elif "sinks" in name:
                weight.fill_(1.0)


def make_llama(
    folder: Path,
    *,
    head_dim: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """A two-layer random Llama in `folder`, with attention sharp enough that a wrong KV cache changes its tokens."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    sharpen(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["head_dim"] == head_dim
    return folder
