"""The operations in PyTorch float32: the specification that every other family is checked against; base.py documents them."""

import torch
from torch import Tensor

from momentkv_vllm import moments as mo
from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.in_torch import add_mass, candidates, grouped, padded, ungrouped
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, fresh_pages


class Reference(KernelFamily):
    """Runs everywhere, slowly."""

    name = "reference"
    devices = ("cpu", "cuda")

    def objections(self) -> list[str]:
        return []

    def _write(self, cache, key, value, slots, mass) -> None:
        fresh = fresh_pages(slots, cache.page_size)
        cache.kv[fresh] = 0
        if mass is not None:
            mass[fresh] = 0
        real = slots >= 0
        pages, offsets = slots[real] // cache.page_size, slots[real] % cache.page_size
        cache.keys[pages, :, offsets] = key[: len(slots)][real]
        cache.values[pages, :, offsets] = value[: len(slots)][real]

    def attend(self, cache, query, output, lse, work: AttendWork, scale: float, corrected: bool) -> None:
        keys, values = cache.read_tokens(work.pages)
        tokens, last_slot, real = padded(work)
        groups = query.shape[1] // keys.shape[1]
        queries = grouped(query[tokens].float(), keys.shape[1])
        visible = torch.arange(keys.shape[2], device=query.device) <= last_slot.unsqueeze(-1)  # [rows, queries, slots]
        # A page's unwritten tail may hold anything: 0 * NaN would be NaN.
        values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
        logits = (queries @ keys.transpose(-1, -2)) * scale
        logits = logits.masked_fill(~visible.repeat(1, groups, 1).unsqueeze(1), -torch.inf)
        total = logits.logsumexp(-1)
        result = (logits - total.unsqueeze(-1)).exp() @ values
        if corrected:
            evicted, log_mass = mo.partial(cache.read_moments(work.moment_pages, work.num_evicted), queries, scale)
            retained, total = total, torch.logaddexp(total, log_mass)
            result = (retained - total).exp().unsqueeze(-1) * result + (log_mass - total).exp().unsqueeze(-1) * evicted
        output[tokens[real]] = ungrouped(result, groups)[real].to(output.dtype)
        if lse is not None:
            lse[tokens[real]] = ungrouped(total.unsqueeze(-1), groups).squeeze(-1)[real]

    def _observe(self, cache, mass, query, lse, work: AttendWork, scale: float) -> None:
        add_mass(cache, mass, query, lse, work, scale)

    def _consolidate(self, cache, mass, work: RetireWork, score, sink_tokens: int, attention_weight) -> None:
        tokens = candidates(cache, None if mass is None else Observed(mass), work, scale=1.0)
        keys, values, store_tokens = tokens.keys, tokens.values, tokens.store_tokens
        score[..., :sink_tokens] = torch.inf
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Padding comes last in the candidates: the stable sort puts it behind a real token whose score is -inf too.
        rank = score.masked_fill(~tokens.valid.unsqueeze(1), -torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, rank[..., :store_tokens], True)
        source = fill_holes(kept, store_tokens)
        if tokens.attention is not None:
            moved = tokens.attention.gather(2, source)
            mass[work.store_pages] = moved.unflatten(2, (-1, cache.page_size)).permute(0, 2, 1, 3)
        if cache.record_layout.has_means:
            lost = (tokens.valid.unsqueeze(1) & ~kept).to(keys.dtype)
            gone = mo.of_tokens(keys, values, lost, cache.record_layout.has_covariance)
            cache.write_moments(work.moment_pages, mo.merge(tokens.moments, gone))
        pick = source.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        cache.write_tokens(work.store_pages, keys.gather(2, pick), values.gather(2, pick))


def fill_holes(kept: Tensor, store_tokens: int) -> Tensor:
    """For every store slot the candidate that it holds next, [rows, heads, store_tokens].

    A kept store token stays where it is; the i-th lost slot takes the i-th kept retiring token. At most as many tokens
    move as retire.
    """
    in_store, retiring = kept[..., :store_tokens], kept[..., store_tokens:]
    source = torch.arange(store_tokens, device=kept.device).expand(in_store.shape).clone()
    moves = min(store_tokens, retiring.shape[-1])
    holes = in_store.int().argsort(dim=-1, stable=True)[..., :moves]
    winners = (~retiring).int().argsort(dim=-1, stable=True)[..., :moves]
    needed = torch.arange(moves, device=kept.device) < (~in_store).sum(-1, keepdim=True)
    return source.scatter_(-1, holes, torch.where(needed, store_tokens + winners, holes))
