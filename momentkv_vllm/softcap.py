"""Logit soft-capping (Gemma 2): a logit x, scaled, becomes cap * tanh(x / cap) before the softmax."""

import torch


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Logits as the softmax sees them. softcap 0: they are not capped."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def slope(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """By how much a capped logit moves with the logit, 1 - tanh(x / cap)^2, like `logits`."""
    return 1 - torch.tanh(logits / softcap).square() if softcap else torch.ones_like(logits)
