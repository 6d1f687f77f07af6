"""Moments of evicted tokens: their mean, how two sets merge, and the attention partial they stand for.

Everything is float32 and batched over (rows, heads). Centred moments are merged pairwise by Chan's formula instead of
subtracting large sums, which cancels in 16 bit (arXiv 2606.01563, eqs. 22-25, rewritten).
"""

from dataclasses import dataclass

import torch

from momentkv_vllm.softcap import capped, slope


@dataclass
class Moments:
    """The evicted tokens of each (row, head).

    count:        [rows] tokens folded in, the same for all heads, or [rows, heads]; 0 = the rest is meaningless and must not be
                  read.
    mean_key:     [rows, heads, head_dim]
    mean_value:   [rows, heads, head_dim]
    value_spread: [rows, heads] mean of ||v - mean_value||^2
    covariance:   [rows, heads, head_dim (key), head_dim (value)] mean of (k - mean_key)(v - mean_value)^T: the transpose of the
                  paper's C, so that C q is a weighted sum of rows like attention over values; or None
    """

    count: torch.Tensor
    mean_key: torch.Tensor
    mean_value: torch.Tensor
    value_spread: torch.Tensor
    covariance: torch.Tensor | None


def per_head(count: torch.Tensor) -> torch.Tensor:
    """A count [rows] or [rows, heads] beside tensors [rows, heads, n]."""
    return count.view(len(count), -1, 1)


def of_tokens(keys: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, covariance: bool) -> Moments:
    """Moments of the tokens where `weight` is 1.

    keys, values: [rows, heads, tokens, head_dim]; weight: [rows, heads, tokens] of 0 and 1, every head of a row with the
    same sum. Rows without any token get count 0 and zeros.
    """
    count = weight.sum(-1)
    share = (weight / count.clamp(min=1).unsqueeze(-1)).unsqueeze(-1)
    mean_key, mean_value = (keys * share).sum(2), (values * share).sum(2)
    dk, dv = keys - mean_key.unsqueeze(2), values - mean_value.unsqueeze(2)
    return Moments(
        count=count[:, 0],
        mean_key=mean_key,
        mean_value=mean_value,
        value_spread=(dv.square() * share).sum((2, 3)),
        covariance=(dk * share).transpose(2, 3) @ dv if covariance else None,
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan et al. 1979). Either side may be empty; nothing of it is read then."""
    count = a.count + b.count
    share = (b.count / count.clamp(min=1))[:, None]
    empty_a = (a.count == 0)[:, None]

    def mix(x: torch.Tensor, y: torch.Tensor, between: torch.Tensor | None) -> torch.Tensor:
        w = share.reshape(share.shape + (1,) * (x.dim() - 2))
        skip = empty_a.reshape(w.shape)
        mixed = x + w * (y - x) if between is None else x + w * (y - x) + w * (1 - w) * between
        return torch.where(skip, y, mixed)

    dk, dv = b.mean_key - a.mean_key, b.mean_value - a.mean_value
    covariance = None
    if a.covariance is not None and b.covariance is not None:
        covariance = mix(a.covariance, b.covariance, dk.unsqueeze(-1) * dv.unsqueeze(-2))
    return Moments(
        count=count,
        mean_key=mix(a.mean_key, b.mean_key, None),
        mean_value=mix(a.mean_value, b.mean_value, None),
        value_spread=mix(a.value_spread, b.value_spread, dv.square().sum(-1)),
        covariance=covariance,
    )


def partial(
    moments: Moments, query: torch.Tensor, scale: float, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention over the evicted tokens would have returned, as one flash-decoding split.

    Args:
        query: [rows, heads, queries, head_dim], the query heads of a KV head side by side.
        scale: softmax scale, usually 1/sqrt(head_dim).
        softcap: logits are capped at it, f(x) = softcap tanh(x / softcap); 0: they are not, f(x) = x.

    Returns:
        (output [rows, heads, queries, head_dim], logsumexp [rows, heads, queries]); -inf where count is 0.
        output = v' + f'(x) scale C q (eq. 9; zeroth order without C), logsumexp = log n + f(x) (eq. 11), with x = scale q.k'.

    Both are what attention gives to first order around the mean key. A token weighs exp(f(x + dx)), with dx = scale q.(k - k'):
    exp(f(x)) (1 + f'(x) dx + ...). The dx add up to zero over the evicted tokens, so their mass is n exp(f(x)), capped or not.
    Their values' weighted mean is v' plus f'(x) times the mean of dx (v - v'), which is scale C q: a cap flattens that step, for
    f' <= 1. Without one f is linear, and this is the paper's. With one the mass is no lower bound: f is concave above 0 only.

    The first-order step is limited to the root mean square distance of the evicted values to their mean: no weighting of
    the evicted values can move further than their spread allows by much, and a far query would otherwise extrapolate.
    """
    empty = per_head(moments.count == 0)
    logits = scale * (query @ moments.mean_key.unsqueeze(-1)).squeeze(-1)
    log_mass = per_head(moments.count.clamp(min=1).log()) + capped(logits, softcap)
    output = moments.mean_value.unsqueeze(2)
    if moments.covariance is not None:
        step = scale * slope(logits, softcap).unsqueeze(-1) * (query @ moments.covariance)
        limit = moments.value_spread.clamp(min=0).sqrt()[:, :, None]
        length = step.norm(dim=-1)
        step = step * torch.where(length > limit, limit / length.clamp(min=1e-30), 1.0).unsqueeze(-1)
        output = output + step
    output = output.expand(*query.shape[:-1], output.shape[-1])
    return torch.where(empty.unsqueeze(-1), 0.0, output), torch.where(empty, -torch.inf, log_mass)
