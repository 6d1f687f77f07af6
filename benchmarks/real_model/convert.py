"""A Llama model in GGUF as a Hugging Face checkpoint: config, weights in bfloat16, tokenizer and chat template.

transformers reads GGUF too, but keeps the weights packed and cannot save them, so that vLLM could not load them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens", "output_norm": "norm",
}  # fmt: skip
"""GGUF's names of a Llama's tensors, and those of Hugging Face. The embedding is also the output layer."""


def convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint of `gguf` into the existing `folder`. Raises KeyError on a tensor that no Llama has."""
    reader = GGUFReader(gguf)
    config = _config({name: field.contents() for name, field in reader.fields.items()})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        *layer, kind, _ = tensor.name.split(".")  # "blk.3.attn_q.weight" or "token_embd.weight"
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind in heads:
            weight = _halves(weight, heads[kind])
        place = f"layers.{layer[1]}." if layer else ""
        weights[f"model.{place}{NAMES[kind]}.weight"] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _save_tokenizer(gguf, folder, config["max_position_embeddings"])


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as Hugging Face's RoPE wants them.

    It rotates dimension i with i + d/2; GGUF's rotates neighbours, so there the two rows of a pair lie side by side.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF keeps both as float32.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **tokens,
    }


def _save_tokenizer(gguf: Path, folder: Path, context: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names the splitting ("smollm": llama.cpp, src/llama-vocab.cpp), and transformers takes GPT-2's for it. Digits
    # stand alone there, which also decides where the spaces before a number go.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)
