"""The kernel interface in PyTorch float32: the specification that every other family is checked against.

attend -> observe -> consolidate, each batched over requests and heads. `rows` are requests of one work list; tensors of
page numbers index vLLM's block pool.
"""

import torch

from momentkv_vllm.kernels import moments as mo
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork
from momentkv_vllm.policies.base import Candidates, Policy


def objections() -> list[str]:
    """Why this family cannot run here; it always can."""
    return []


def attend(
    cache: CacheView, query: torch.Tensor, work: AttendWork, scale: float, correct: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the retained tokens and, if `correct`, the moments as one more split of the same softmax.

    Args:
        cache: the layer's cache, this step's keys and values already stored.
        query: [rows, queries, num_heads, head_dim], padded like `work.last`.
        work: pages to read and causal limits.
        scale: softmax scale.
        correct: add the evicted mass back.

    Returns:
        (output [rows, queries, num_heads, head_dim] float32, logsumexp [rows, queries, num_heads] float32, moments
        included). Padded queries return unspecified finite numbers.
    """
    rows, queries, num_heads, head_dim = query.shape
    keys, values = cache.read_tokens(work.pages)
    grouped = _group(query.float(), keys.shape[1])
    slots = torch.arange(keys.shape[2], device=query.device)
    visible = slots <= work.last.unsqueeze(-1)  # [rows, queries, slots]
    # A page's unwritten tail may hold anything: 0 * NaN would be NaN.
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    logits = (grouped @ keys.transpose(-1, -2)) * scale
    groups = num_heads // keys.shape[1]
    logits = logits.masked_fill(~visible.repeat(1, groups, 1).unsqueeze(1), -torch.inf)
    lse = logits.logsumexp(-1)
    output = (logits - lse.unsqueeze(-1)).exp() @ values
    if correct:
        evicted, log_mass = mo.partial(cache.read_moments(work.moment_pages, work.count), grouped, scale)
        total = torch.logaddexp(lse, log_mass)
        output = (lse - total).exp().unsqueeze(-1) * output + (log_mass - total).exp().unsqueeze(-1) * evicted
        lse = total
    output = output.view(rows, -1, groups, queries, head_dim).permute(0, 3, 1, 2, 4)
    lse = lse.view(rows, -1, groups, queries).permute(0, 3, 1, 2)
    return output.reshape(query.shape), lse.reshape(rows, queries, num_heads)


def observe(
    cache: CacheView, slot_mass: torch.Tensor, query: torch.Tensor, lse: torch.Tensor, work: AttendWork, scale: float
) -> None:
    """Add the attention mass that the observed queries give to every retained token to `slot_mass`, in place.

    Args:
        slot_mass: [num_pages, num_kv_heads, page_size] float32.
        query, lse: as given to and returned by `attend`.
        work: `work.observed` [rows, queries] says which queries count, `work.restart` which rows begin at zero.
    """
    slot_mass[work.pages[work.restart]] = 0.0
    keys, _ = cache.read_tokens(work.pages)
    rows, heads, num_slots, _ = keys.shape
    grouped = _group(query.float(), heads)
    slots = torch.arange(num_slots, device=query.device)
    counted = (slots <= work.last.unsqueeze(-1)) & work.observed.unsqueeze(-1)
    groups = query.shape[2] // heads
    logits = (grouped @ keys.transpose(-1, -2)) * scale - _group(lse.unsqueeze(-1), heads)
    mass = torch.where(counted.repeat(1, groups, 1).unsqueeze(1), logits.exp(), 0.0).sum(2)
    paged = mass.view(rows, heads, -1, cache.page_size).permute(0, 2, 1, 3)
    # Accumulate: padding repeats the null page, so a plain assignment would lose sums.
    slot_mass.index_put_((work.pages,), paged, accumulate=True)


def consolidate(
    cache: CacheView,
    slot_mass: torch.Tensor | None,
    work: RetireWork,
    policy: Policy,
    sink_tokens: int,
    scale: float,
) -> None:
    """Retire pages: their tokens compete with the store, losers join the moments, winners take the losers' slots.

    Per (row, head): exactly store_tokens candidates stay; sinks, the first slots of the store, always stay.

    Args:
        slot_mass: as filled by `observe`; None unless the policy needs it.
        work: store, retiring and moment pages, and the count before this event.
    """
    pages = torch.cat([work.store_pages, work.retiring_pages], 1)
    store_tokens = work.store_pages.shape[1] * cache.page_size
    valid = (pages >= 0).repeat_interleave(cache.page_size, 1)
    pages = pages.clamp(min=0)
    # Padding reads the null page, which may hold anything: 0 * NaN would be NaN.
    keys, values = (torch.where(valid[:, None, :, None], x, 0.0) for x in cache.read_tokens(pages))
    before = cache.read_moments(work.moment_pages, work.count)
    attention = None if slot_mass is None else _slots_of(slot_mass, pages)
    score = policy.score(Candidates(keys, values, valid, store_tokens, before, attention, scale))
    score[..., :sink_tokens] = torch.inf
    score = score.masked_fill(~valid.unsqueeze(1), -torch.inf)

    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(store_tokens, -1).indices, True)
    if cache.record.has_means:
        lost = (valid.unsqueeze(1) & ~kept).to(keys.dtype)
        gone = mo.of_tokens(keys, values, lost, cache.record.has_covariance)
        cache.write_moments(work.moment_pages, mo.merge(before, gone))
    source = _fill_holes(kept, store_tokens).unsqueeze(-1)
    pick = source.expand(-1, -1, -1, keys.shape[-1])
    cache.write_tokens(work.store_pages, keys.gather(2, pick), values.gather(2, pick))


def _fill_holes(kept: torch.Tensor, store_tokens: int) -> torch.Tensor:
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


def _group(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, queries, num_heads, d] -> [rows, heads, groups * queries, d]: the query heads of a KV head side by side."""
    rows, queries, num_heads, d = x.shape
    return x.view(rows, queries, heads, num_heads // heads, d).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, d)


def _slots_of(slot_mass: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    rows = pages.shape[0]
    return slot_mass[pages].permute(0, 2, 1, 3).reshape(rows, slot_mass.shape[1], -1)
