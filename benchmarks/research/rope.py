"""Does RoPE wash out the mean key over far positions? The code model, the older part of its context evicted at random.

    make bench NAME=rope

Per layer: how much of the keys' length their mean keeps, for the fastest and the slowest quarter of frequencies; and the error
of the attention output of the last 64 queries with no correction, with one set of means, with 4 sets by age, and with means of
de-rotated keys that are rotated back to 16 positions of the evicted stretch (an ideal: 16 log-masses a query instead of one).
"""

import argparse

import report
import torch
from research.simulate import SimulatedModel
from research.state_search import MODELS
from test_model.code_text import held_out_rows
from test_model.model import rope, rotate
from transformers import AutoTokenizer

RECENT, QUERIES, SETS, PLACES, KEPT_SHARE = 128, 64, 4, 16, 0.125

Rows = list[dict[str, float]]


class Layers(SimulatedModel):
    """Measures every layer of one exact forward pass."""

    rows: Rows

    def _attention(self, module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
        output, _ = super()._attention(module, query, key, value, attention_mask, scaling)
        self.rows.append(measure(query, key, value, scaling))
        return output, None


def unrotate(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return rotate(key, cos, -sin)


def measure(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> dict[str, float]:
    """query [rows, num_heads, tokens, d], key and value [rows, kv_heads, tokens, d], after RoPE."""
    rows, heads, tokens, d = key.shape
    cos, sin = rope(tokens)
    old = tokens - RECENT
    evicted = torch.rand(rows, heads, old, generator=torch.Generator().manual_seed(0)) >= KEPT_SHARE
    q = query[:, :, -QUERIES:].unflatten(1, (heads, -1)).flatten(2, 3)
    logits = q @ key.transpose(-1, -2) * scale
    limit = torch.arange(tokens - QUERIES, tokens).repeat(query.shape[1] // heads).unsqueeze(-1)
    logits.masked_fill_(torch.arange(tokens) > limit, -torch.inf)
    exact = logits.softmax(-1) @ value
    kept = logits.clone()
    kept[..., :old].masked_fill_(evicted.unsqueeze(2), -torch.inf)
    mass, plain = kept.logsumexp(-1, keepdim=True), kept.softmax(-1) @ value

    def error(log_mass: torch.Tensor | None, means: torch.Tensor | None) -> float:
        """log_mass [rows, heads, queries, sets], means [rows, heads, sets, d] of the values."""
        out = plain
        if log_mass is not None:
            weight = torch.cat([mass, log_mass], -1).softmax(-1)
            out = weight[..., :1] * plain + weight[..., 1:] @ means
        return ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()

    def sets(number: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts and mean keys and values of the evicted tokens, in equal stretches by age."""
        member = torch.nn.functional.one_hot(torch.arange(old) * number // old, number).T * evicted.unsqueeze(2).float()
        count = member.sum(-1, keepdim=True)
        return count, member @ keys[:, :, :old] / count, member @ value[:, :, :old] / count

    def zeroth(number: int) -> float:
        count, k, v = sets(number, key)
        return error(q @ k.transpose(-1, -2) * scale + count.log().transpose(-1, -2), v)

    count, k, v = sets(1, unrotate(key, cos, sin))
    places = (torch.arange(PLACES) + 0.5) * old / PLACES
    back = rotate(k.expand(-1, -1, PLACES, -1), cos[places.long()], sin[places.long()])
    ideal = (q @ back.transpose(-1, -2) * scale).logsumexp(-1, keepdim=True) + (count / PLACES).log()
    mean, length = sets(1, key)[1].squeeze(2).unflatten(-1, (2, -1)), key[:, :, :old].unflatten(-1, (2, -1))
    left = (mean.square().sum(2) / length.square().sum(3).mean(2)).sqrt().mean((0, 1))  # [d / 2], fastest pair first
    return {
        "mean / length, fastest quarter": left[: d // 8].mean().item(),
        "mean / length, slowest quarter": left[-d // 8 :].mean().item(),
        "error: no correction": error(None, None), "error: zeroth": zeroth(1), "error: 4 sets by age": zeroth(SETS),
        "error: de-rotated, 16 places": error(ideal, v),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()
    folder = MODELS / "code_checkpoint"
    model = Layers(folder)
    model.rows = []
    ids = held_out_rows(AutoTokenizer.from_pretrained(folder), args.context, args.samples, 1)
    model.log_probs(ids, slice(-1, None), None)
    print(report.table([["layer", *model.rows[0]], *([i, *r.values()] for i, r in enumerate(model.rows))]))
    report.write("rope", {"context": args.context, "layers": model.rows})


if __name__ == "__main__":
    main()
