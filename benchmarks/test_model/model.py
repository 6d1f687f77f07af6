"""A compact Llama for training on a CPU; its parameters carry the Hugging Face names, so saving is a plain state dict."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Of a Llama; by default that of the test models."""

    hidden: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 320
    rope_theta: float = 10000.0


HEAD_DIM = Shape.head_dim


def rope(length: int, head_dim: int = HEAD_DIM, theta: float = Shape.rope_theta) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [length, head_dim] in Hugging Face's rotate-half convention."""
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.head_dim, self.groups = shape.hidden, shape.head_dim, shape.heads // shape.kv_heads
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-5)
        attention = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
        self.self_attn = nn.ModuleDict(
            {n: nn.Linear(hidden, h * self.head_dim, bias=False) for n, h in attention.items()}
        )
        self.self_attn["o_proj"] = nn.Linear(shape.heads * self.head_dim, hidden, bias=False)
        self.mlp = nn.ModuleDict({n: nn.Linear(hidden, shape.mlp, bias=False) for n in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(shape.mlp, hidden, bias=False)
        nn.init.zeros_(self.self_attn["o_proj"].weight)
        nn.init.zeros_(self.mlp["down_proj"].weight)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[n](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeated by hand: with enable_gqa the CPU falls back to materialised logits.
        k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(-2))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Model(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.embed_tokens = nn.Embedding(vocabulary, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden, vocabulary, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        nn.init.zeros_(self.lm_head.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        cos, sin = rope(ids.shape[1], self.shape.head_dim, self.shape.rope_theta)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def save_checkpoint(model: Model, folder: Path, context_tokens: int) -> None:
    """Write an HF LlamaForCausalLM checkpoint in bfloat16, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.shape
    config = LlamaConfig(
        vocab_size=model.lm_head.out_features, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, rms_norm_eps=1e-5, rope_theta=shape.rope_theta,
        max_position_embeddings=max(4096, context_tokens), bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    target = LlamaForCausalLM(config)
    state = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in model.state_dict().items()}
    target.load_state_dict(state)
    target.to(torch.bfloat16).save_pretrained(folder)


def load_checkpoint(model: Model, folder: Path) -> None:
    """Read back what `save_checkpoint` wrote (bfloat16 weights into the float32 model)."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in state.items()})
