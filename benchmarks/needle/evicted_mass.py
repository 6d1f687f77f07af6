"""How much attention a quarter cache loses on running text, layer by layer, and what the correction gives back.

    python benchmarks/needle/evicted_mass.py

One eviction to 192 tokens (4 sinks, 16 newest, the rest by distance to the mean key) of 1,000, the last 8 queries of 4 texts.
Errors are |output - full| / |full|; "true mass" replaces Jensen's bound (eq. 11) by the exact evicted mass.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
from model import HEAD_DIM, KV_HEADS, Model, load_checkpoint  # noqa: E402
from tasks import WORDS, sample  # noqa: E402

from momentkv_vllm.kernels import moments as mo  # noqa: E402

SINKS, WINDOW, KEPT, QUERIES = 4, 16, 192, 8


def attention_inputs(ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(query, key, value) of every layer, as the trained model computes them."""
    seen = []
    exact = F.scaled_dot_product_attention

    def recording(query, key, value, **options):
        seen.append((query, key, value))
        return exact(query, key, value, **options)

    model = Model(len(WORDS))
    load_checkpoint(model, HERE / "checkpoint")
    F.scaled_dot_product_attention = recording
    with torch.no_grad():
        model(ids)
    F.scaled_dot_product_attention = exact
    return seen


def layer_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, float]:
    """Mean evicted mass and relative output errors of one layer."""
    scale = HEAD_DIM**-0.5
    score = (key - key[:, :, SINKS:-WINDOW].mean(2, keepdim=True)).norm(dim=-1)
    score[:, :, :SINKS], score[:, :, -WINDOW:] = torch.inf, torch.inf
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(KEPT, -1).indices, True)
    grouped = query[:, :, -QUERIES:].unflatten(1, (KV_HEADS, -1)).flatten(2, 3)
    logits = grouped @ key.transpose(-1, -2) * scale
    full = logits.softmax(-1) @ value
    left = logits.masked_fill(~kept.unsqueeze(2), -torch.inf)
    off, lse = left.softmax(-1) @ value, left.logsumexp(-1)
    evicted = logits.masked_fill(kept.unsqueeze(2), -torch.inf).logsumexp(-1)
    first = mo.of_tokens(key, value, (~kept).float(), True)
    zeroth = mo.Moments(first.count, first.mean_key, first.mean_value, first.value_spread, None)

    def error(output: torch.Tensor) -> float:
        return ((output - full).norm(dim=-1) / full.norm(dim=-1)).mean().item()

    def corrected(moments: mo.Moments, true_mass: bool) -> float:
        output, mass = mo.partial(moments, grouped, scale)
        mass = evicted if true_mass else mass
        share = (mass - torch.logaddexp(lse, mass)).exp().unsqueeze(-1)
        return error((1 - share) * off + share * output)

    return {
        "evicted mass": (evicted - torch.logaddexp(lse, evicted)).exp().mean().item(),
        "off": error(off),
        "zeroth": corrected(zeroth, False),
        "first": corrected(first, False),
        "zeroth, true mass": corrected(zeroth, True),
        "first, true mass": corrected(first, True),
    }


def main() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    texts = [["<s>", *sample("text", rng, 1000).prompt.split()] for _ in range(4)]
    layers = attention_inputs(torch.tensor([[WORDS.index(w) for w in words] for words in texts]))
    rows = [layer_row(*layer) for layer in layers]
    cells = [[i, *(f"{v:.4f}" for v in row.values())] for i, row in enumerate(rows)]
    print(report.table([["layer", *rows[0]], *cells]))
    report.write("evicted_mass", rows)


if __name__ == "__main__":
    main()
