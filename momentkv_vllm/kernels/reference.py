"""The operations in PyTorch float32: the specification that every other family is checked against; base.py documents them."""

from dataclasses import fields

import torch
from torch import Tensor

from momentkv_vllm import moments as mo
from momentkv_vllm.kernels.base import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.in_torch import Retained, add_mass, candidates, ungrouped
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, fresh_pages
from momentkv_vllm.key_centres import centres_of, of_slots
from momentkv_vllm.packed_store import Packed
from momentkv_vllm.policies.base import Candidates


class Reference(KernelFamily):
    """Runs everywhere, slowly."""

    name = "reference"
    devices = ("cpu", "cuda")
    feeds_back = True

    def objections(self) -> list[str]:
        return []

    def _write(self, cache, key, value, slots, mass) -> None:
        fresh = fresh_pages(slots, cache.page_size)
        cache.raw[fresh] = 0
        if mass is not None:
            mass[fresh] = 0
        real = slots >= 0
        pages, offsets = slots[real] // cache.page_size, slots[real] % cache.page_size
        cache.keys[pages, :, offsets] = cache.as_stored(key[: len(slots)][real], cache.key_scale)
        cache.values[pages, :, offsets] = cache.as_stored(value[: len(slots)][real], cache.value_scale)

    def attend(self, cache, query, output, lse, work: AttendWork, scale: float, corrected: bool) -> None:
        retained = Retained.of(cache, work)
        queries, logits = retained.logits(query, scale)
        groups, tokens, real = query.shape[1] // retained.keys.shape[1], retained.tokens, retained.real
        total = logits.logsumexp(-1)
        result = (logits - total.unsqueeze(-1)).exp() @ retained.values
        if corrected:
            moments = cache.read_moments(work.moment_pages, work.num_evicted)
            evicted, log_mass = mo.partial(moments, queries, scale, cache.softcap)
            kept, total = total, torch.logaddexp(total, log_mass)
            result = (kept - total).exp().unsqueeze(-1) * result + (log_mass - total).exp().unsqueeze(-1) * evicted
        output[tokens[real]] = ungrouped(result, groups)[real].to(output.dtype)
        if lse is not None:
            lse[tokens[real]] = ungrouped(total.unsqueeze(-1), groups).squeeze(-1)[real]

    def _observe(self, cache, mass, query, lse, work: AttendWork, scale: float) -> None:
        add_mass(cache, mass, query, lse, work, scale)

    def _consolidate(self, cache: CacheView, mass, work: RetireWork, score, sink_tokens: int, attention_weight) -> None:
        tokens = candidates(cache, Observed(mass) if mass is not None else None, work, scale=1.0)
        score = torch.zeros_like(tokens.keys[..., 0]) if score is None else score
        kept = chosen(score, tokens.valid, tokens.store_tokens, work.run_tokens, sink_tokens)
        full = torch.full((len(kept),), tokens.store_tokens, device=kept.device)
        source = fill_holes(kept, full if work.stored is None else work.stored, tokens.store_tokens)
        if mass is not None:
            self._move_mass(cache, mass, work, tokens.attention.gather(2, source))
        if work.stored is not None:
            centres = _centres(cache, tokens, work)
            cache.packed.write(work.store_pages, _packed(cache, tokens, work, source, centres))
        else:
            pick = _wide(source, tokens.keys)
            cache.write_tokens(work.store_pages, tokens.keys.gather(2, pick), tokens.values.gather(2, pick))
        # After the tokens: a record may lie behind those of the last store page.
        if cache.record_layout.has_means:
            lost = (tokens.valid.unsqueeze(1) & ~kept).to(tokens.keys.dtype)
            gone = mo.of_tokens(tokens.keys, tokens.values, lost, cache.record_layout.has_covariance)
            cache.write_moments(work.moment_pages, mo.merge(tokens.moments, gone))
        if cache.record_layout.has_centres:
            cache.write_centres(work.moment_pages, centres)

    @staticmethod
    def _move_mass(cache: CacheView, mass: Tensor, work: RetireWork, moved: Tensor) -> None:
        page_tokens = cache.page_size if work.stored is None else cache.packed.page_tokens
        moved = torch.nn.functional.pad(moved, (0, work.store_pages.shape[1] * page_tokens - moved.shape[2]))
        view = mass[:, :, :page_tokens]
        view[work.store_pages] = moved.unflatten(2, (-1, page_tokens)).permute(0, 2, 1, 3)


def _centres(cache: CacheView, tokens: Candidates, work: RetireWork) -> Tensor | None:
    """Of a sequence's keys, found at the first event of its store."""
    if not cache.record_layout.has_centres:
        return None
    known = (work.stored > 0).view(-1, 1, 1, 1)
    return torch.where(known, cache.read_centres(work.moment_pages), centres_of(tokens.keys, tokens.valid))


def _packed(cache: CacheView, tokens: Candidates, work: RetireWork, source: Tensor, centres: Tensor | None) -> Packed:
    """The store's pages after the event: winners are quantised, what stays is copied; slots without a token stay as they are."""
    old, layout = cache.packed.read(work.store_pages), cache.packed.layout
    place = torch.arange(old.keys.shape[2], device=source.device)
    source = torch.nn.functional.pad(source, (0, len(place) - source.shape[2]))
    entering = (source >= work.stored.view(-1, 1, 1)) & (place < work.store_tokens)
    entering &= source < tokens.valid.sum(1).view(-1, 1, 1)
    pick = _wide(source, tokens.keys)
    keys = tokens.keys.gather(2, pick)
    if centres is not None:
        keys = keys - of_slots(centres, keys.shape[2])
    new = Packed.of(keys, tokens.values.gather(2, pick), layout, cache.feedback)
    # A store that shrinks moves what it holds, bytes and all.
    moved = torch.where((source < work.stored.view(-1, 1, 1)) & (place < work.store_tokens), source, place)
    old = Packed(*(getattr(old, f.name).gather(2, _wide(moved, getattr(old, f.name))) for f in fields(Packed)))
    return Packed(
        *(torch.where(entering.unsqueeze(-1), getattr(new, f.name), getattr(old, f.name)) for f in fields(Packed))
    )


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, -1, like.shape[-1])


def chosen(score: Tensor, valid: Tensor, store_tokens: int, run_tokens: int, sink_tokens: int) -> Tensor:
    """Which candidates [rows, heads, tokens] stay: as many as the store holds, runs of `run_tokens` neighbours together.

    A run's score is the mean of its tokens'; of equal runs the earlier one stays, a run with a NaN goes first, one that holds
    a sink stays.
    """
    tokens = score.shape[-1]
    # Candidates are whole runs; what pads them need not be.
    score, valid = (torch.nn.functional.pad(x, (0, -tokens % run_tokens)) for x in (score, valid))
    runs = score.unflatten(-1, (-1, run_tokens)).mean(-1)
    runs[..., : -(-sink_tokens // run_tokens)] = torch.inf
    runs = runs.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    real = valid[:, ::run_tokens].unsqueeze(1)
    # Padding comes last in the candidates: the stable sort puts it behind a real run whose score is -inf too.
    rank = runs.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, rank[..., : store_tokens // run_tokens], True)
    return (kept & real).repeat_interleave(run_tokens, -1)[..., :tokens]


def fill_holes(kept: Tensor, filled: Tensor, store_tokens: int) -> Tensor:
    """For every store slot the candidate that it holds next, [rows, heads, store_tokens].

    The first `filled` [rows] candidates are in the store. A kept one stays where it is; the i-th lost or empty slot takes the
    i-th kept retiring token; those of a store that held more than `store_tokens` until now come before them. An empty slot that
    stays empty names a candidate behind the last one, or itself.
    """
    candidates = torch.arange(kept.shape[-1], device=kept.device)
    in_store = candidates < filled.clamp(max=store_tokens).view(-1, 1, 1)
    slots = candidates[:store_tokens]
    stays = (kept & in_store)[..., :store_tokens]
    source = slots.expand(stays.shape).clone()
    holes = stays.int().argsort(dim=-1, stable=True)
    retiring = kept & ~in_store
    winners = (~retiring).int().argsort(dim=-1, stable=True)[..., :store_tokens]
    needed = (slots < (~stays).sum(-1, keepdim=True)) & (slots < retiring.sum(-1, keepdim=True))
    return source.scatter_(-1, holes, torch.where(needed, winners, holes))
