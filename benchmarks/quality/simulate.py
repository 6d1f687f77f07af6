"""Eviction inside a Hugging Face model, without vLLM: whole prompts at once, any score, any state, exact logits.

A causal layer needs nothing of later layers, so one attention call per layer can play all the events of a prompt one after
the other. The page schedule and the scores are the product's own; tests compare its answers with the engine's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quality.states import State
from transformers import AttentionInterface, AutoModelForCausalLM

from momentkv_vllm.kernels import moments as mo
from momentkv_vllm.kernels.reference import _fill_holes
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.policies import Candidates, Policy


@dataclass
class Eviction:
    """One way to evict. `state` makes a fresh summary of the evicted tokens, None = no correction."""

    policy: Policy
    schedule: PageSchedule
    state: Callable[[], State] | None = None
    sink_tokens: int = 4
    observation_tokens: int = 32
    prompt_tokens: int = 0


def evicting_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: Eviction
) -> torch.Tensor:
    """Causal attention of a whole sequence under eviction.

    Args:
        query: [rows, num_heads, tokens, head_dim] float32; key, value: [rows, num_kv_heads, tokens, head_dim].

    Returns:
        [rows, num_heads, tokens, head_dim].
    """
    rows, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    queries = query.unflatten(1, (kv_heads, heads // kv_heads))
    output = torch.empty_like(queries)
    plan, page = how.schedule, how.schedule.page_size
    state = how.state() if how.state else None
    covariance = how.policy.needs_covariance
    exact = mo.of_tokens(key[:, :, :1], value[:, :, :1], torch.zeros(rows, kv_heads, 1), covariance)
    stored_k, stored_v = key[:, :, :0], value[:, :, :0]
    mass = torch.zeros(rows, kv_heads, 0)
    start = window = 0
    while start < tokens:
        event = plan.next_event(start, how.prompt_tokens)
        end = min(tokens, event)
        k, v = torch.cat([stored_k, key[:, :, window:end]], 2), torch.cat([stored_v, value[:, :, window:end]], 2)
        grouped = queries[:, :, :, start:end].flatten(2, 3)
        logits = grouped @ k.transpose(-1, -2) * scale
        positions = torch.cat([torch.full((stored_k.shape[2],), -1), torch.arange(window, end)])
        hidden = positions > torch.arange(start, end).repeat(heads // kv_heads).unsqueeze(-1)
        logits.masked_fill_(hidden, -torch.inf)
        total = logits.logsumexp(-1)
        if state is not None and exact.count[0] > 0:
            evicted, log_mass = state.partial(grouped, scale)
            everything = torch.logaddexp(total, log_mass)
            weight = (logits - everything.unsqueeze(-1)).exp_()
            result = weight @ v + (log_mass - everything).exp().unsqueeze(-1) * evicted
        else:
            weight = (logits - total.unsqueeze(-1)).exp_()
            result = weight @ v
        output[:, :, :, start:end] = result.unflatten(2, (-1, end - start))
        if how.policy.needs_attention:
            first = 0 if how.policy.observes_all_queries else max(start, event - how.observation_tokens)
            observed = weight.unflatten(2, (-1, end - start))[:, :, :, max(0, first - start) :].sum((2, 3))
            # Slots of an unfinished page keep what they had: the window's part of `mass` grows with it.
            mass = torch.nn.functional.pad(mass, (0, observed.shape[-1] - mass.shape[-1])) + observed
        if end < event:
            break
        boundary = plan.boundary(event, how.prompt_tokens) * page
        kept_slots = stored_k.shape[2] or plan.store_tokens
        num = stored_k.shape[2] + boundary - window
        candidates = Candidates(
            keys=k[:, :, :num], values=v[:, :, :num], valid=torch.ones(rows, num, dtype=torch.bool),
            store_tokens=kept_slots, moments=exact, scale=scale,
            attention=mass[..., :num] if how.policy.needs_attention else None,
        )  # fmt: skip
        score = how.policy.score(candidates)
        score[..., : how.sink_tokens] = torch.inf
        rank = score.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, rank[..., :kept_slots], True)
        lost = (~kept).float()
        if state is not None:
            state.absorb(candidates.keys, candidates.values, lost, exact)
        exact = mo.merge(exact, mo.of_tokens(candidates.keys, candidates.values, lost, covariance))
        source = _fill_holes(kept, kept_slots)
        pick = source.unsqueeze(-1).expand(-1, -1, -1, dim)
        stored_k, stored_v = candidates.keys.gather(2, pick), candidates.values.gather(2, pick)
        if how.policy.needs_attention:
            rest = mass[..., num:] if how.policy.observes_all_queries else torch.zeros(rows, kv_heads, end - boundary)
            moved = mass[..., :num].gather(2, source)
            mass = torch.cat([moved if how.policy.observes_all_queries else torch.zeros_like(moved), rest], -1)
        start, window = end, boundary
    return output.flatten(1, 2)


@dataclass
class SimulatedModel:
    """A checkpoint whose attention evicts. `layer_errors` collects |output - exact| / |exact| of every layer call."""

    path: Path | str
    how: Eviction | None = None
    measure_errors: bool = False
    layer_errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The registry is global: a name a model.
        name = f"momentkv_simulated_{id(self)}"
        AttentionInterface.register(name, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, attn_implementation=name)

    def _attention(self, module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
        exact = None
        if self.how is None or self.measure_errors:
            exact = torch.nn.functional.scaled_dot_product_attention(
                query, *(x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value)),
                is_causal=True, scale=scaling,
            )  # fmt: skip
        output = exact if self.how is None else evicting_attention(query, key, value, scaling, self.how)
        if self.measure_errors and self.how is not None:
            # What the layer returns stays exact, so that a layer's error is its own.
            last = slice(query.shape[2] // 2, None)
            error = (output - exact)[:, :, last].norm(dim=-1) / exact[:, :, last].norm(dim=-1)
            self.layer_errors.append(error.mean().item())
            output = exact
        return output.transpose(1, 2), None

    @torch.no_grad()
    def log_probs(self, ids: torch.Tensor, places: slice, how: Eviction | None) -> torch.Tensor:
        """Next-token log-probabilities [rows, places, vocabulary] after every token of ids[:, places]."""
        self.how = how
        hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, places]
        return self.model.lm_head(hidden).float().log_softmax(-1)
