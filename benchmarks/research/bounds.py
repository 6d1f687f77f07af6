"""How far a better score could go, what heads would gain from budgets of their own, and where the correction errs.

    PYTHONPATH=benchmarks python -P -m research.bounds --documents LEVAL --what default reach oracle shared errors

One text at a time, float32, with the product's page schedule, quantised store, runs and default score. Unlike quality/simulate.py
a mask per head says which tokens are alive: so heads may differ, and an oracle may look at queries to come.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from evaluation.judge import documents
from evaluation.judge.material import KINDS, TEXT_TOKENS, Material
from evaluation.quality.results import mean_error
from real_model import folder
from research.simulate import SimulatedModel, as_stored, exact_attention
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from momentkv_vllm.attention.head_reach import Probe, random_tokens
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import equal_until, shared
from momentkv_vllm.key_centres import centres_of, of_slots
from momentkv_vllm.kv_spec import StateLayout
from momentkv_vllm.policies.key_direction import ATTENTION_WEIGHT

BLOCK = 16
"""Queries whose attention the oracle adds up: events come every so many tokens or a multiple."""
WHAT = {
    "default": {}, "oracle": {"oracle": True}, "shared": {"shared": "attention"}, "pooled": {"shared": "score"},
    "oracle shared": {"oracle": True, "shared": "oracle"}, "errors": {"errors": True},
    "reach": {"reach": "lent"}, "reach in layers": {"reach": "in layers"}, "reach of layers": {"reach": "of layers"},
    "reach, anyone to anyone": {"reach": "anyone"},
}  # fmt: skip
"""oracle: a token's score is the attention that the judged queries still to come will give it (attention over all tokens).
shared: a layer's heads share its store, each at least a fifth of its part: a head gets as many runs as it has among the layer's
best by observed attention (which decays by a tenth per event, as in Ada-KV), by the default score, or by the oracle.
reach: heads hold what momentkv_vllm/head_budgets.py gives them; heads of a layer among themselves; layers, whose heads hold the
same; or all heads, as if later layers could lend to earlier ones too. Everywhere else heads hold the same."""


@dataclass
class Variant:
    layout: StateLayout
    oracle: bool = False
    shared: str = ""
    reach: str = ""
    capacity: torch.Tensor | None = None
    """With `reach`: [layers, heads] tokens."""
    feedback: list[torch.Tensor] | None = None
    """By layer, of errors in keys (momentkv_vllm/key_rounding.py); None: every number is rounded by itself."""
    errors: bool = False
    found: list[dict[str, float]] = field(default_factory=list)
    """With `errors`: of every layer, in turn."""


class Layer:
    """Attention of one layer over one text. key, value: [1, heads, tokens, d] exact; held_*: as they are held now."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: Variant, number: int = 0
    ) -> None:
        self.capacity = None if how.capacity is None else how.capacity[number].view(1, -1, 1)
        self.key, self.value, self.scale, self.how = key, value, scale, how
        self.heads, self.tokens = key.shape[1:3]
        self.query = query.unflatten(1, (self.heads, -1))
        self.packed = self._packed(None if how.feedback is None else how.feedback[number])
        self.held_k, self.held_v = key.clone(), value.clone()
        self.alive = torch.ones(1, self.heads, self.tokens, dtype=torch.bool)
        self.mass, self.recent = torch.zeros(2, 1, self.heads, self.tokens)
        self.boundary, self.means, self.sums = 0, None, []
        self.gone: list[torch.Tensor | float] = [0.0, 0.0, 0.0]
        self.output = torch.empty_like(self.query)
        self.future = self._future() if how.oracle or how.shared == "oracle" else None

    def _packed(self, feedback: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens as the store holds them."""
        plan, layout = self.how.layout.schedule, self.how.layout.packed
        first = plan.boundary_column(plan.first_event_tokens) * plan.page_size
        centres = of_slots(centres_of(self.key[:, :, :first], torch.ones(1, first, dtype=torch.bool)), self.tokens)
        return as_stored(self.key, self.value, centres, layout, feedback)

    def _future(self) -> torch.Tensor:
        """[1, heads, blocks + 1, tokens] attention that each token gets from the judged queries of this and all later blocks."""
        blocks = -(-self.tokens // BLOCK)
        table = torch.zeros(1, self.heads, blocks + 1, self.tokens)
        for block in range((self.tokens - TEXT_TOKENS) // BLOCK, blocks):
            first, last = block * BLOCK, min(self.tokens, (block + 1) * BLOCK)
            logits = self._logits(first, last, self.key)
            table[:, :, block, :last] = logits.softmax(-1).unflatten(2, (-1, last - first)).sum((2, 3))
        return table.flip(2).cumsum(2).flip(2)

    def _logits(self, first: int, last: int, keys: torch.Tensor) -> torch.Tensor:
        """[1, heads, queries of all groups, last] with what comes later at -inf."""
        grouped = self.query[:, :, :, first:last].flatten(2, 3)
        later = torch.arange(last) > torch.arange(first, last).unsqueeze(-1)
        logits = grouped @ keys[:, :, :last].transpose(-1, -2) * self.scale
        return logits.masked_fill_(later.repeat(self.query.shape[2], 1), -torch.inf)

    def attend(self) -> torch.Tensor:
        start, plan = 0, self.how.layout.schedule
        while start < self.tokens:
            event = plan.next_event(start)
            end = min(self.tokens, event)
            for first in range(start, end, 4 * BLOCK):
                self._block(first, min(end, first + 4 * BLOCK), event)
            if end == event:
                self._retire(event)
            start = end
        if self.sums:
            self.how.found.append({k: sum(s[k] for s in self.sums) / len(self.sums) for k in self.sums[0]})
        return self.output.flatten(1, 2)

    def _block(self, first: int, last: int, event: int) -> None:
        logits = self._logits(first, last, self.held_k).masked_fill_(~self.alive[:, :, None, :last], -torch.inf)
        kept_mass = total = logits.logsumexp(-1)
        if self.means:
            count, mean_key, mean_value = self.means
            grouped = self.query[:, :, :, first:last].flatten(2, 3)
            mass = count.clamp(min=1e-30).log().unsqueeze(-1) + self.scale * (grouped @ mean_key.unsqueeze(-1)).squeeze(
                -1
            )
            total = torch.logaddexp(kept_mass, mass)
        weight = (logits - total.unsqueeze(-1)).exp()
        result = weight @ self.held_v[:, :, :last]
        if self.means:
            if self.how.errors and first >= self.tokens - TEXT_TOKENS:
                kept = (logits - kept_mass.unsqueeze(-1)).exp() @ self.held_v[:, :, :last]
                self.sums.append(self._errors(first, last, kept, kept_mass, mass))
            result += (mass - total).exp().unsqueeze(-1) * mean_value.unsqueeze(2)
        self.output[:, :, :, first:last] = result.unflatten(2, (-1, last - first))
        seen = max(first, event - self.how.layout.schedule.page_size)
        if seen < last:
            self.mass[..., :last] += weight.unflatten(2, (-1, last - first))[:, :, :, seen - first :].sum((2, 3))

    def _errors(self, first: int, last: int, kept: torch.Tensor, kept_mass: torch.Tensor, mass: torch.Tensor) -> dict:
        """|output - exact| / |exact| with the correction's mass and direction, or the true ones in their place."""
        logits = self._logits(first, last, self.key)
        exact = logits.softmax(-1) @ self.value[:, :, :last]
        gone = logits.masked_fill(self.alive[:, :, None, :last], -torch.inf)
        true_mass = gone.logsumexp(-1)
        true = gone.softmax(-1) @ self.value[:, :, :last]
        mean = self.means[2].unsqueeze(2).expand_as(true)

        def error(m: torch.Tensor, o: torch.Tensor) -> float:
            share = (m - torch.logaddexp(kept_mass, m)).exp().unsqueeze(-1)
            return ((kept + share * (o - kept) - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()

        return {
            "evicted share": (true_mass - logits.logsumexp(-1)).exp().mean().item(),
            "log mass - true": (mass - true_mass).mean().item(),
            "cosine": F.cosine_similarity(mean, true, dim=-1).mean().item(),
            "off": error(torch.full_like(mass, -1e30), mean), "zeroth": error(mass, mean),
            "true mass": error(true_mass, mean), "true direction": error(mass, true), "both": error(true_mass, true),
        }  # fmt: skip

    def _relative(self, x: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        return x / ((x * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True)).clamp(min=1e-30)

    def _score(self, event: int, end: int) -> torch.Tensor:
        """policies/momentkv.py where other tokens are alive in every head; or the oracle's."""
        if self.how.oracle:
            return self.future[:, :, event // BLOCK, :end]
        keys, values, alive = self.held_k[:, :, :end], self.held_v[:, :, :end], self.alive[..., :end].float()
        anchor = (F.normalize(keys, dim=-1) * alive.unsqueeze(-1)).sum(2, keepdim=True)
        turned = (1 - F.cosine_similarity(keys, anchor, dim=-1)).clamp(min=0)
        own = (values * alive.unsqueeze(-1)).sum(2) / alive.sum(-1, keepdim=True)
        distance = (values - (self.means[2] if self.means else own).unsqueeze(2)).norm(dim=-1)
        observed = self._relative(self.mass[..., :end] * distance, alive)
        return self._relative(turned, alive) + ATTENTION_WEIGHT * observed

    def _retire(self, event: int) -> None:
        plan = self.how.layout.schedule
        end, run = plan.boundary_column(event) * plan.page_size, plan.run_tokens
        new, self.boundary, self.recent = slice(self.boundary, end), end, 0.9 * self.recent + self.mass
        alive = self.alive[..., :end].unflatten(-1, (-1, run))[..., 0]
        part = plan.store_tokens // run
        if end > equal_until(plan.store_tokens, plan.retire_tokens) if self.how.reach else end > plan.store_tokens:
            score = self._score(event, end).unflatten(-1, (-1, run)).mean(-1)
            score[..., 0] = torch.inf
            score = score.masked_fill(~alive, -torch.inf)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            kept = alive & (rank < self._parts(score, alive, part, event))
            self._forget((alive & ~kept).repeat_interleave(run, -1), end)
        # Like the product: scores and moments have read the new ones as they were.
        self.held_k[:, :, new], self.held_v[:, :, new] = (x[:, :, new] for x in self.packed)
        self.mass = torch.zeros_like(self.mass)

    def _parts(self, score: torch.Tensor, alive: torch.Tensor, part: int, event: int) -> torch.Tensor | int:
        """Runs of every head."""
        if self.capacity is not None:
            return self.capacity // self.how.layout.schedule.run_tokens
        if not self.how.shared:
            return part
        by = {"attention": self.recent, "oracle": None if self.future is None else self.future[:, :, event // BLOCK]}
        what = score
        if self.how.shared != "score":
            end = score.shape[-1] * self.how.layout.schedule.run_tokens
            what = by[self.how.shared][..., :end].unflatten(-1, (score.shape[-1], -1)).mean(-1)
        best = what.masked_fill(~alive, -torch.inf).sort(dim=-1, descending=True).values
        best[..., : part // 5] = torch.inf
        taken = torch.zeros(best.numel()).index_fill(
            0, best.flatten().topk(min(part * self.heads, best.numel())).indices, 1
        )
        return taken.view_as(best).sum(-1, keepdim=True)

    def _forget(self, lost: torch.Tensor, end: int) -> None:
        """lost: [1, heads, end] joins the evicted, of which a head may have none."""
        self.alive[..., :end] &= ~lost
        gone = lost.float().unsqueeze(-1)
        held = torch.ones_like(gone), self.held_k[:, :, :end], self.held_v[:, :, :end]
        self.gone = [total + (x * gone).sum(2) for total, x in zip(self.gone, held, strict=True)]
        count, keys, values = self.gone
        self.means = count.squeeze(-1), keys / count.clamp(min=1), values / count.clamp(min=1)


class Model:
    """A checkpoint whose attention is that of a variant; None: the full cache's."""

    def __init__(self, path: str) -> None:
        AttentionInterface.register("momentkv_bounds", self._attention)
        kind = {"dtype": torch.float32, "attn_implementation": "momentkv_bounds"}
        self.model = AutoModelForCausalLM.from_pretrained(path, **kind)
        self.how: Variant | None = None
        self.probes: list[Probe] | None = None

    @torch.no_grad()
    def reach(self) -> torch.Tensor:
        """[layers, heads], as the worker measures it."""
        self.probes = []
        self.model.model(random_tokens(self.model.config.vocab_size, 1 << 20)[None], use_cache=False)
        reach, self.probes = torch.stack([p.reach for p in self.probes]), None
        return reach

    def _attention(self, module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
        if self.probes is not None:
            probe, output = Probe(scaling), torch.empty_like(query[0].transpose(0, 1))
            probe.attend(*(x[0].transpose(0, 1) for x in (query, key, value)), output)
            self.probes.append(probe)
            return output.unsqueeze(0), None
        if self.how is None:
            return exact_attention(query, key, value, scaling).transpose(1, 2), None
        return Layer(query, key, value, scaling, self.how, module.layer_idx).attend().transpose(1, 2), None

    @torch.no_grad()
    def log_probs(self, ids: list[int], how: Variant | None) -> torch.Tensor:
        """[judged, vocabulary]."""
        self.how = how
        hidden = self.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[0, -TEXT_TOKENS - 1 : -1]).log_softmax(-1)


def give_keys_biases(model: Any, size: float) -> None:
    """Keys get a part that all have, as Qwen2.5's biases give them: normal numbers of this size in the channels that positions
    turn least (the last of each half, Hugging Face's order). The full cache's answers stay nearly what they were."""
    generator, d = torch.Generator().manual_seed(0), model.config.head_dim
    for layer in model.model.layers:
        project = layer.self_attn.k_proj
        bias = torch.zeros(project.out_features // d, d)
        bias[:, [d // 2 - 1, d - 1]] = size * torch.randn(len(bias), 2, generator=generator)
        project.bias = torch.nn.Parameter(bias.flatten())


def capacity_of(reach: torch.Tensor, who: str, layout: StateLayout, longest: int) -> torch.Tensor:
    """[layers, heads] tokens: see WHAT."""
    given = layout.schedule.store_tokens, layout.schedule.run_tokens, longest
    if who == "in layers":
        return torch.cat([shared(of_layer[None], *given) for of_layer in reach])
    if who == "of layers":
        return shared(reach.mean(-1, keepdim=True), *given).expand(reach.shape)
    return shared(reach.view(1, -1), *given).view_as(reach) if who == "anyone" else shared(reach, *given)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(folder.FOLDER))
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--what", nargs="+", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--key-bias", type=float, default=0.0, help="size of a part that all keys of a head have")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--out", default="judge_bounds", help="results/NAME.json")
    args = parser.parse_args()
    model, tokenizer = Model(args.model), AutoTokenizer.from_pretrained(args.model)
    give_keys_biases(model.model, args.key_bias)
    config = EvictionConfig.from_dict({"policy": "momentkv", "budget_tokens": args.budget})
    layout = StateLayout.of(config, 16, model.model.config.head_dim, torch.bfloat16)
    feedback = SimulatedModel(args.model).feedback
    variants = {name: Variant(layout, feedback=feedback, **WHAT[name]) for name in args.what}
    reach = model.reach()
    for variant in filter(lambda v: v.reach, variants.values()):
        variant.capacity = capacity_of(reach, variant.reach, layout, KINDS["text_2k"].context)
    found: dict[str, list[float]] = {name: [] for name in args.what}
    material = Material(tokenizer, documents.load(args.documents, "choose"), "choose")
    for item in tqdm(material.items("text_2k", args.texts), desc="texts"):
        ids = [*item.prompt, *item.answer]
        full = model.log_probs(ids, None)
        for name, variant in variants.items():
            found[name].append((full.exp() * (full - model.log_probs(ids, variant))).sum(-1).mean().item())
    rows = [[name, "{:.3f} +-{:.3f}".format(*mean_error(kls))] for name, kls in found.items()]
    print(report.table([["what", "KL"], *rows]))
    errors = variants["errors"].found if "errors" in variants else []
    report.write(
        args.out,
        {"half": "choose", "key bias": args.key_bias, "budget": args.budget, "kl": found, "errors_by_layer": errors},
    )


if __name__ == "__main__":
    main()
