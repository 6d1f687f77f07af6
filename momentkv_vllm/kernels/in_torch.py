"""What every family leaves to PyTorch, in float32: candidates for scores that no kernel knows, statistics of logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.key_centres import of_slots
from momentkv_vllm.policies.base import Candidates
from momentkv_vllm.rotation import rotated
from momentkv_vllm.softcap import capped


def read_store(cache: CacheView, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, less their centres, and values of quantised store pages [rows, n], float32 [rows, heads, slots, head_dim]."""
    assert cache.packed is not None, "no store is quantised"
    keys, values = cache.packed.read(pages).numbers(cache.packed.layout)
    return rotated(keys)[..., : cache.keys.shape[-1]], rotated(values)[..., : cache.keys.shape[-1]]


def _stored(
    cache: CacheView, pages: Tensor, record_pages: Tensor,
    read_store: Callable[[CacheView, Tensor], tuple[Tensor, Tensor]] = read_store,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Likewise with their centres."""
    keys, values = read_store(cache, pages)
    if cache.record_layout.has_centres:
        keys = keys + of_slots(cache.read_centres(record_pages), keys.shape[2])
    return keys, values


def candidates(
    cache: CacheView, observed: Observed | None, work: RetireWork, scale: float,
    read_store: Callable[[CacheView, Tensor], tuple[Tensor, Tensor]] = read_store,
) -> Candidates:  # fmt: skip
    """What a policy scores at the events of `work`: a row's store, then its retiring tokens, then padding."""
    exact, exact_valid = _exact_pages(work)
    keys, values = cache.read_tokens(exact.clamp(min=0))
    seen = observed.of_pages(exact.clamp(min=0), cache.page_size) if observed else None
    valid = exact_valid.repeat_interleave(cache.page_size, 1)
    if work.stored is not None:
        stored = _stored(cache, work.store_pages, work.moment_pages, read_store)
        keys, values = (torch.cat(pair, 2) for pair in zip(stored, (keys, values), strict=True))
        if seen is not None:
            seen = torch.cat([observed.of_pages(work.store_pages, cache.packed.page_tokens), seen], 2)
        slots = torch.arange(keys.shape[2] - valid.shape[1], device=valid.device)
        valid = torch.cat([slots < work.stored.unsqueeze(1), valid], 1)
        order = valid.int().argsort(dim=1, descending=True, stable=True)
        valid, keys, values = valid.gather(1, order), _taken(keys, order), _taken(values, order)
        seen = None if seen is None else _taken(seen, order)
    # Padding reads pages that may hold anything: 0 * NaN would be NaN.
    keys, values = (torch.where(valid[:, None, :, None], x, 0.0) for x in (keys, values))
    attention = None
    if seen is not None:
        attention = torch.where(valid.view(len(valid), 1, -1, *[1] * (seen.dim() - 3)), seen, 0.0)
    moments = cache.read_moments(work.moment_pages, work.num_evicted)
    store_tokens, run_tokens = work.capacity(cache.page_size), work.run_tokens
    return Candidates(keys, values, valid, store_tokens, moments, attention, scale, cache.softcap, run_tokens)


def _exact_pages(work: RetireWork) -> tuple[Tensor, Tensor]:
    """Pages of candidates that are not quantised [rows, n], and which are real; those of the store come first."""
    if work.stored is None:
        store_is_exact = torch.ones_like(work.store_pages, dtype=torch.bool)
    else:
        store_is_exact = (work.stored == 0).unsqueeze(1).expand(work.store_pages.shape)
    pages = torch.cat([work.store_pages, work.retiring_pages], 1)
    return pages, torch.cat([store_is_exact, work.retiring_pages >= 0], 1)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x [rows, heads, tokens, ...] with its tokens in `order` [rows, n]."""
    index = order.view(len(order), 1, -1, *[1] * (x.dim() - 3))
    return x.gather(2, index.expand(*x.shape[:2], order.shape[1], *x.shape[3:]))


@dataclass
class Retained:
    """What the queries of a work list see: keys and values [rows, heads, slots, head_dim] float32, those of a quantised store
    first, and which slots, [rows, queries, slots]. Of slots that no query of a row sees keys and values are zero.

    tokens: [rows, queries] flat tokens of the queries; real: which of them are no padding.
    softcap: of the logits, 0: none.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    tokens: Tensor
    real: Tensor
    softcap: float

    @classmethod
    def of(cls, cache: CacheView, work: AttendWork) -> "Retained":
        keys, values = cache.read_tokens(work.pages)
        tokens, last_slot, real = padded(work)
        slots = torch.arange(keys.shape[2], device=keys.device).expand(len(keys), 1, -1)
        if work.stored is not None:
            slots = slots - (work.stored > 0).view(-1, 1, 1) * work.store_pages * cache.page_size
        visible = (slots >= 0) & (slots <= last_slot.unsqueeze(-1))
        if work.stored is not None:
            old_keys, old_values = _stored(cache, work.pages[:, : work.store_pages], work.moment_pages)
            held = torch.arange(old_keys.shape[2], device=keys.device) < work.stored.unsqueeze(1)
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            visible = torch.cat([held.unsqueeze(1).expand(-1, visible.shape[1], -1), visible], 2)
        # What no query sees may hold anything: 0 * NaN would be NaN.
        seen = visible.any(1)[:, None, :, None]
        keys, values = (torch.where(seen, x, 0.0) for x in (keys, values))
        return cls(keys, values, visible, tokens, real, cache.softcap)

    def logits(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(queries [rows, heads, groups * queries, head_dim], their logits [rows, heads, groups * queries, slots], -inf where
        they do not see) of `query` [tokens, num_heads, head_dim]."""
        heads = self.keys.shape[1]
        queries = grouped(query[self.tokens].float(), heads)
        visible = self.visible.repeat(1, query.shape[1] // heads, 1).unsqueeze(1)
        logits = capped((queries @ self.keys.transpose(-1, -2)) * scale, self.softcap)
        return queries, logits.masked_fill(~visible, -torch.inf)


def add_mass(cache: CacheView, mass: Tensor, query: Tensor, lse: Tensor, work: AttendWork, scale: float) -> None:
    """`observe` of attention mass."""
    retained = Retained.of(cache, work)
    _, logits = retained.logits(query, scale)
    seen = (logits - grouped(lse[retained.tokens].unsqueeze(-1), retained.keys.shape[1])).exp()
    _add(cache, mass, work, torch.where(_counted(retained, work, logits), seen, 0.0).sum(2))


def add_logits(cache: CacheView, statistics: Tensor, query: Tensor, work: AttendWork, scale: float) -> None:
    """`observe` of logits: count, sum, sum of squares."""
    retained = Retained.of(cache, work)
    _, logits = retained.logits(query, scale)
    counted = _counted(retained, work, logits)
    seen = (torch.ones_like(logits), logits, logits.square())
    _add(cache, statistics, work, torch.stack([torch.where(counted, x, 0.0).sum(2) for x in seen], -1))


def _counted(retained: Retained, work: AttendWork, logits: Tensor) -> Tensor:
    """Which logits are of queries that the policy wants and of slots that they see."""
    first = torch.arange(retained.real.shape[1], device=logits.device) >= work.observe_from.unsqueeze(-1)
    wanted = (retained.real & first).repeat(1, logits.shape[2] // retained.real.shape[1])
    return wanted[:, None, :, None] & (logits > -torch.inf)


def _add(cache: CacheView, observed: Tensor, work: AttendWork, seen: Tensor) -> None:
    """seen: [rows, heads, slots] as in `Retained` (or with a last dimension of 3)."""
    observed[work.pages[work.restart]] = 0.0
    exact = work.pages.shape[1] * cache.page_size
    parts = [(work.pages, cache.page_size, seen[:, :, seen.shape[2] - exact :])]
    if work.stored is not None:
        parts.append((work.pages[:, : work.store_pages], cache.packed.page_tokens, seen[:, :, :-exact]))
    for pages, page_tokens, part in parts:
        paged = part.unflatten(2, (pages.shape[1], page_tokens)).transpose(1, 2)
        # Accumulate: padding repeats the null page, so a plain assignment would lose sums.
        view = observed[:, :, :page_tokens]
        view.index_put_((pages,), paged, accumulate=True)


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
