"""What every family leaves to PyTorch, in float32: candidates for scores that no kernel knows, statistics of logits."""

import torch
from torch import Tensor

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Candidates


def candidates(cache: CacheView, observed: Observed | None, work: RetireWork, scale: float) -> Candidates:
    """What a policy scores at the events of `work`."""
    pages = torch.cat([work.store_pages, work.retiring_pages], 1)
    valid = (pages >= 0).repeat_interleave(cache.page_size, 1)
    pages = pages.clamp(min=0)
    # Padding reads the null page, which may hold anything: 0 * NaN would be NaN.
    keys, values = (torch.where(valid[:, None, :, None], x, 0.0) for x in cache.read_tokens(pages))
    moments = cache.read_moments(work.moment_pages, work.num_evicted)
    attention = None
    if observed is not None:
        seen = observed.of_pages(pages)
        attention = torch.where(valid.view(len(valid), 1, -1, *[1] * (seen.dim() - 3)), seen, 0.0)
    store_tokens = work.store_pages.shape[1] * cache.page_size
    return Candidates(keys, values, valid, store_tokens, moments, attention, scale)


def add_mass(cache: CacheView, mass: Tensor, query: Tensor, lse: Tensor, work: AttendWork, scale: float) -> None:
    """`observe` of attention mass."""
    tokens, counted, logits = _observed_logits(cache, query, work, scale)
    seen = (logits - grouped(lse[tokens].unsqueeze(-1), cache.keys.shape[1])).exp()
    _add(cache, mass, work, torch.where(counted, seen, 0.0).sum(2))


def add_logits(cache: CacheView, statistics: Tensor, query: Tensor, work: AttendWork, scale: float) -> None:
    """`observe` of logits: count, sum, sum of squares."""
    _, counted, logits = _observed_logits(cache, query, work, scale)
    seen = (torch.ones_like(logits), logits, logits.square())
    _add(cache, statistics, work, torch.stack([torch.where(counted, x, 0.0).sum(2) for x in seen], -1))


def _observed_logits(cache: CacheView, query: Tensor, work: AttendWork, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(flat tokens [rows, queries]; which (query, slot) count and their logits, [rows, heads, groups * queries, slots])"""
    assert work.observe_from is not None, "no policy asks"
    keys, _ = cache.read_tokens(work.pages)
    heads, num_slots = keys.shape[1:3]
    tokens, last_slot, real = padded(work)
    wanted = real & (torch.arange(tokens.shape[1], device=query.device) >= work.observe_from.unsqueeze(-1))
    counted = (torch.arange(num_slots, device=query.device) <= last_slot.unsqueeze(-1)) & wanted.unsqueeze(-1)
    logits = (grouped(query[tokens].float(), heads) @ keys.transpose(-1, -2)) * scale
    return tokens, counted.repeat(1, query.shape[1] // heads, 1).unsqueeze(1), logits


def _add(cache: CacheView, observed: Tensor, work: AttendWork, seen: Tensor) -> None:
    """seen: [rows, heads, slots] of the rows' pages (or with a last dimension of 3)."""
    observed[work.pages[work.restart]] = 0.0
    paged = seen.unflatten(2, (-1, cache.page_size)).transpose(1, 2).reshape(*work.pages.shape, *observed.shape[1:])
    # Accumulate: padding repeats the null page, so a plain assignment would lose sums.
    observed.index_put_((work.pages,), paged, accumulate=True)


def grouped(x: Tensor, heads: int) -> Tensor:
    """[rows, queries, num_heads, d] -> [rows, heads, groups * queries, d]: the query heads of a KV head side by side."""
    rows, queries, num_heads, d = x.shape
    return x.view(rows, queries, heads, num_heads // heads, d).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, d)


def ungrouped(x: Tensor, groups: int) -> Tensor:
    """Inverse of `grouped`."""
    rows, heads, _, d = x.shape
    return x.view(rows, heads, groups, -1, d).permute(0, 3, 1, 2, 4).reshape(rows, -1, heads * groups, d)


def padded(work: AttendWork) -> tuple[Tensor, Tensor, Tensor]:
    """Flat token, last visible slot and reality of every query, [rows, most queries]; padding repeats the first query."""
    offset = torch.arange(int(work.num_queries.max()), device=work.num_queries.device)
    real = offset < work.num_queries.unsqueeze(-1)
    offset = torch.where(real, offset, 0)
    return work.first_token.unsqueeze(-1) + offset, work.last_slot.unsqueeze(-1) + offset, real
