"""The kernel interface in PyTorch float32: the specification that every other family is checked against.

store -> attend -> observe -> consolidate, each batched over requests and heads. `rows` are requests of one work list;
tensors of page numbers index vLLM's block pool.
"""

import torch

from momentkv_vllm import moments as mo
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.limits import Limits
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, fresh_pages
from momentkv_vllm.policies.base import Candidates, Policy

LIMITS = Limits()


def objections() -> list[str]:
    """Why this family cannot run here; it always can."""
    return []


def store(
    cache: CacheView, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, slot_mass: torch.Tensor | None
) -> None:
    """Write new tokens; a page is zeroed when its first slot is written.

    A fresh page may have been a moment page: as keys and values its bytes can be NaN, and vLLM's kernel multiplies
    unwritten slots by zero.

    Args:
        key, value: [tokens, num_kv_heads, head_dim] of the cache's dtype.
        slots: [tokens] int64, page * page_size + slot; negative = padding, not stored.
        slot_mass: as in `observe`, zeroed on fresh pages; None unless the policy needs it.
    """
    fresh = fresh_pages(slots, cache.page_size)
    cache.kv[fresh] = 0
    if slot_mass is not None:
        slot_mass[fresh] = 0
    real = slots >= 0
    pages, offsets = slots[real] // cache.page_size, slots[real] % cache.page_size
    cache.keys[pages, :, offsets] = key[: len(slots)][real]
    cache.values[pages, :, offsets] = value[: len(slots)][real]


def attend(
    cache: CacheView,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    work: AttendWork,
    scale: float,
    correct: bool,
) -> None:
    """Attention over the retained tokens and, if `correct`, the moments as one more split of the same softmax.

    Writes the tokens of `work` into `output` and `lse`; other tokens are not touched.

    Args:
        cache: the layer's cache, this step's keys and values already stored.
        query: [tokens, num_heads, head_dim], the step's flat token list.
        output: like `query`.
        lse: [tokens, num_heads] float32 logsumexp, moments included; None if not wanted.
        work: pages to read and causal limits.
        scale: softmax scale.
        correct: add the evicted mass back.
    """
    keys, values = cache.read_tokens(work.pages)
    tokens, last, real = _padded(work)
    groups = query.shape[1] // keys.shape[1]
    grouped = _group(query[tokens].float(), keys.shape[1])
    slots = torch.arange(keys.shape[2], device=query.device)
    visible = slots <= last.unsqueeze(-1)  # [rows, queries, slots]
    # A page's unwritten tail may hold anything: 0 * NaN would be NaN.
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    logits = (grouped @ keys.transpose(-1, -2)) * scale
    logits = logits.masked_fill(~visible.repeat(1, groups, 1).unsqueeze(1), -torch.inf)
    total = logits.logsumexp(-1)
    result = (logits - total.unsqueeze(-1)).exp() @ values
    if correct:
        evicted, log_mass = mo.partial(cache.read_moments(work.moment_pages, work.count), grouped, scale)
        retained, total = total, torch.logaddexp(total, log_mass)
        result = (retained - total).exp().unsqueeze(-1) * result + (log_mass - total).exp().unsqueeze(-1) * evicted
    output[tokens[real]] = _ungroup(result, groups)[real].to(output.dtype)
    if lse is not None:
        lse[tokens[real]] = _ungroup(total.unsqueeze(-1), groups).squeeze(-1)[real]


def observe(
    cache: CacheView, slot_mass: torch.Tensor, query: torch.Tensor, lse: torch.Tensor, work: AttendWork, scale: float
) -> None:
    """Add what the observed queries give to every retained token to `slot_mass`, in place: attention mass, or logits.

    Args:
        slot_mass: [num_pages, num_kv_heads, page_size] float32 attention mass; with a last dimension of 3: count, sum and sum
            of squares of the logits.
        query, lse: as given to and written by `attend`.
        work: `work.observe_from` [rows] says which queries count, `work.restart` which rows begin at zero.
    """
    slot_mass[work.pages[work.restart]] = 0.0
    keys, _ = cache.read_tokens(work.pages)
    rows, heads, num_slots, _ = keys.shape
    groups = query.shape[1] // heads
    tokens, last, real = _padded(work)
    observed = real & (torch.arange(tokens.shape[1], device=query.device) >= work.observe_from.unsqueeze(-1))
    slots = torch.arange(num_slots, device=query.device)
    counted = (slots <= last.unsqueeze(-1)) & observed.unsqueeze(-1)
    grouped = _group(query[tokens].float(), heads)
    logits = (grouped @ keys.transpose(-1, -2)) * scale
    if slot_mass.dim() == 4:
        seen = [torch.ones_like(logits), logits, logits.square()]
    else:
        seen = [(logits - _group(lse[tokens].unsqueeze(-1), heads)).exp()]
    counted = counted.repeat(1, groups, 1).unsqueeze(1)
    mass = torch.stack([torch.where(counted, x, 0.0).sum(2) for x in seen], -1)
    paged = mass.unflatten(2, (-1, cache.page_size)).transpose(1, 2).reshape(*work.pages.shape, *slot_mass.shape[1:])
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

    Per (row, head): exactly store_tokens candidates stay; sinks, the first slots of the store, always stay. Of equal scores
    the earlier candidate stays (store slots come before retiring tokens); a NaN score goes first.

    Args:
        slot_mass: as filled by `observe`, moved along with the tokens; None unless the policy needs it.
        work: store, retiring and moment pages, and the count before this event.
    """
    tokens = candidates(cache, slot_mass, work, scale)
    keys, values, before, store_tokens = tokens.keys, tokens.values, tokens.moments, tokens.store_tokens
    score = policy.score(tokens)
    score[..., :sink_tokens] = torch.inf
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # Padding comes last in the candidates: the stable sort puts it behind a real token whose score is -inf too.
    rank = score.masked_fill(~tokens.valid.unsqueeze(1), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, rank[..., :store_tokens], True)
    if cache.record.has_means:
        lost = (tokens.valid.unsqueeze(1) & ~kept).to(keys.dtype)
        gone = mo.of_tokens(keys, values, lost, cache.record.has_covariance)
        cache.write_moments(work.moment_pages, mo.merge(before, gone))
    source = _fill_holes(kept, store_tokens).unsqueeze(-1)
    pick = source.expand(-1, -1, -1, keys.shape[-1])
    cache.write_tokens(work.store_pages, keys.gather(2, pick), values.gather(2, pick))
    if slot_mass is not None and policy.observes.what == "mass":
        moved = tokens.attention.gather(2, source.squeeze(-1))
        slot_mass[work.store_pages] = moved.unflatten(2, (-1, cache.page_size)).permute(0, 2, 1, 3)


def candidates(cache: CacheView, slot_mass: torch.Tensor | None, work: RetireWork, scale: float) -> Candidates:
    """What a policy scores at the events of `work`."""
    pages = torch.cat([work.store_pages, work.retiring_pages], 1)
    valid = (pages >= 0).repeat_interleave(cache.page_size, 1)
    pages = pages.clamp(min=0)
    # Padding reads the null page, which may hold anything: 0 * NaN would be NaN.
    keys, values = (torch.where(valid[:, None, :, None], x, 0.0) for x in cache.read_tokens(pages))
    moments = cache.read_moments(work.moment_pages, work.count)
    attention = None
    if slot_mass is not None:
        seen = _slots_of(slot_mass, pages)
        attention = torch.where(valid.view(len(valid), 1, -1, *[1] * (seen.dim() - 3)), seen, 0.0)
    store_tokens = work.store_pages.shape[1] * cache.page_size
    return Candidates(keys, values, valid, store_tokens, moments, attention, scale)


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


def _ungroup(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of `_group`."""
    rows, heads, _, d = x.shape
    return x.view(rows, heads, groups, -1, d).permute(0, 3, 1, 2, 4).reshape(rows, -1, heads * groups, d)


def _padded(work: AttendWork) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat token, last visible slot and reality of every query, [rows, most queries]; padding repeats the first query."""
    offset = torch.arange(int(work.queries.max()), device=work.queries.device)
    real = offset < work.queries.unsqueeze(-1)
    offset = torch.where(real, offset, 0)
    return work.first_token.unsqueeze(-1) + offset, work.last.unsqueeze(-1) + offset, real


def _slots_of(slot_mass: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[rows, heads, slots] (or with the last dimension of 3) of the given pages."""
    return slot_mass[pages].transpose(1, 2).flatten(2, 3)
