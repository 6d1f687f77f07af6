"""Small random-weight models made on the spot: real Hugging Face checkpoints with a word-level tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
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


def make_adapter(folder: Path, rank: int = 4) -> Path:
    """A random LoRA adapter of the tiny Llama's queries and values (hidden size 64, 4 and 2 heads of 32)."""
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 128), ("v_proj", 64)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, 64, generator=random)
            weights[f"{key}.lora_B.weight"] = torch.randn(width, rank, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
