"""Ways to remember evicted tokens, for the simulator: what they cost and what they answer.

All are float32 here; what the product stores in fewer bits is rounded after every event, as the product does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from momentkv_vllm import moments as mo
from momentkv_vllm.fp8 import truncated

Partial = tuple[torch.Tensor, torch.Tensor]
"""(output [rows, heads, queries, d], logsumexp [rows, heads, queries]) of the evicted tokens."""
Rounding = Callable[[torch.Tensor], torch.Tensor]


class State(ABC):
    """A summary of the evicted tokens of every (row, head)."""

    @abstractmethod
    def tokens(self, dim: int) -> int:
        """What it costs, in KV tokens of 2 * dim 16-bit numbers."""

    @abstractmethod
    def absorb(self, keys: torch.Tensor, values: torch.Tensor, lost: torch.Tensor, before: mo.Moments) -> None:
        """Take in the tokens where `lost` [rows, heads, tokens] is 1; `before`: the exact moments until now."""

    @abstractmethod
    def partial(self, query: torch.Tensor, scale: float) -> Partial: ...


def _bytes_as_tokens(num_bytes: float, dim: int) -> int:
    return math.ceil(num_bytes / (4 * dim))


def to_bfloat16(c: torch.Tensor) -> torch.Tensor:
    return c.bfloat16().float()


def to_int8(c: torch.Tensor) -> torch.Tensor:
    """A scale per row, as kernels/cache_view.py stores it."""
    step = c.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (c / step).round() * step


def to_int4(x: torch.Tensor, group: int = 32) -> torch.Tensor:
    """Scale and zero (16 bits each) per group of neighbouring dimensions."""
    grouped = x.unflatten(-1, (-1, min(group, x.shape[-1])))
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((most - least) / 15).clamp(min=1e-30)
    return (((grouped - least) / step).round() * step + least).flatten(-2)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """E4M3 without a scale, as vLLM's CPU attention writes kv_cache_dtype "fp8" when a checkpoint brings none: towards zero."""
    return truncated(x, 1.0, torch.float8_e4m3fn).float()


ROUNDED: dict[str, tuple[Rounding, float]] = {
    "fp8 KV": (to_fp8, 8), "int8 KV": (to_int8, 8 + 16 / 64), "int4 KV": (to_int4, 4 + 32 / 32),
}  # fmt: skip
"""Ways to keep all tokens in fewer bits: what a key or value becomes, and bits per number with the scales (head dimension 64)."""


class MomentState(State):
    """n, k', v' and the covariance in some form.

    Args:
        order: 0 (means only) or 1.
        covariance_bytes: a number of the covariance; `rounding`: what storing it does to it.
        rank: keep only so many singular directions of the covariance (16-bit factors); None = all.
        limit: the trust region of momentkv_vllm/moments.py.
        key_variance: add half the logits' variance to the log mass, from the diagonal of the key covariance, at most 1/2.
    """

    def __init__(
        self, order: int, covariance_bytes: int = 4, rounding: Rounding | None = None, rank: int | None = None,
        limit: bool = True, key_variance: bool = False,
    ) -> None:  # fmt: skip
        self.order, self.covariance_bytes, self.rounding = order, covariance_bytes, rounding
        self.rank, self.limit, self.key_variance = rank, limit, key_variance
        self.moments: mo.Moments | None = None
        self.variance: torch.Tensor | None = None

    def tokens(self, dim: int) -> int:
        means = 4 * (2 * dim + 1) + (4 * dim if self.key_variance else 0)
        if self.order == 0:
            return _bytes_as_tokens(means, dim)
        if self.rank is not None:
            return _bytes_as_tokens(means + 2 * self.rank * 2 * dim, dim)
        scales = 4 * dim if self.covariance_bytes == 1 else 0
        return _bytes_as_tokens(means + scales + self.covariance_bytes * dim**2, dim)

    def absorb(self, keys: torch.Tensor, values: torch.Tensor, lost: torch.Tensor, before: mo.Moments) -> None:
        gone = mo.of_tokens(keys, values, lost, self.order == 1)
        if self.key_variance:
            spread = mo.of_tokens(keys, keys, lost, True)
            diagonal = spread.covariance.diagonal(dim1=-2, dim2=-1)
            if self.variance is None:
                self.variance = diagonal
            else:
                share = (gone.count / (gone.count + before.count))[:, None, None]
                between = (gone.mean_key - before.mean_key).square()
                self.variance = (1 - share) * self.variance + share * diagonal + share * (1 - share) * between
        self.moments = gone if self.moments is None else mo.merge(self.moments, gone)
        if self.order == 0:
            return
        covariance = self.moments.covariance
        if self.rank is not None:
            u, s, v = torch.linalg.svd(covariance)
            r = self.rank
            covariance = to_bfloat16(u[..., :r] * s[..., None, :r]) @ to_bfloat16(v[..., :r, :])
        if self.rounding is not None:
            covariance = self.rounding(covariance)
        self.moments.covariance = covariance

    def partial(self, query: torch.Tensor, scale: float) -> Partial:
        m = self.moments
        if not self.limit:
            unlimited = torch.full_like(m.value_spread, torch.inf)
            m = mo.Moments(m.count, m.mean_key, m.mean_value, unlimited, m.covariance)
        output, log_mass = mo.partial(m, query, scale)
        if self.key_variance:
            half = 0.5 * scale**2 * (query.square() @ self.variance.unsqueeze(-1)).squeeze(-1)
            log_mass = log_mass + half.clamp(max=0.5)
        return output, log_mass


class Clusters(State):
    """Several sets of zeroth-order moments: by key (nearest centre, k-means at the start) or by age (equal stretches)."""

    def __init__(self, sets: int, by_age: int = 0) -> None:
        """by_age: tokens of a stretch; 0 = by key."""
        self.sets, self.by_age = sets, by_age
        self.mass: torch.Tensor | None = None
        self.keys = self.values = torch.empty(0)
        self.seen = 0.0

    def tokens(self, dim: int) -> int:
        return _bytes_as_tokens(self.sets * (2 * 2 * dim + 4), dim)

    def absorb(self, keys: torch.Tensor, values: torch.Tensor, lost: torch.Tensor, before: mo.Moments) -> None:
        rows, heads, _, dim = keys.shape
        if self.mass is None:
            self.mass = torch.zeros(rows, heads, self.sets)
            self.keys, self.values = (torch.zeros(rows, heads, self.sets, dim) for _ in range(2))
            if not self.by_age:
                self._start(keys, lost)
        self.seen += lost[0, 0].sum().item()
        if self.by_age:
            member = torch.zeros(*lost.shape, self.sets)
            member[..., min(self.sets - 1, int(self.seen // self.by_age))] = 1.0
        else:
            member = torch.nn.functional.one_hot(torch.cdist(keys, self.keys).argmin(-1), self.sets).float()
        member = (member * lost.unsqueeze(-1)).transpose(2, 3)  # [rows, heads, sets, tokens]
        mass = self.mass + member.sum(-1)
        share = 1 / mass.clamp(min=1).unsqueeze(-1)
        self.keys = self.keys + share * (member @ keys - member.sum(-1, keepdim=True) * self.keys)
        self.values = self.values + share * (member @ values - member.sum(-1, keepdim=True) * self.values)
        self.mass = mass

    def _start(self, keys: torch.Tensor, lost: torch.Tensor) -> None:
        """Centres after five rounds of k-means from tokens spread over the first evicted ones."""
        order = lost.argsort(dim=-1, descending=True, stable=True)
        pick = (torch.arange(self.sets) * lost[0, 0].sum().item() / self.sets).long()
        at = order[..., pick].unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        self.keys = keys.gather(2, at)
        for _ in range(5):
            near = torch.nn.functional.one_hot(torch.cdist(keys, self.keys).argmin(-1), self.sets).float()
            near = (near * lost.unsqueeze(-1)).transpose(2, 3)
            total = near.sum(-1, keepdim=True)
            self.keys = torch.where(total > 0, near @ keys / total.clamp(min=1), self.keys)

    def partial(self, query: torch.Tensor, scale: float) -> Partial:
        log_mass = scale * (query @ self.keys.transpose(-1, -2)) + self.mass.log().unsqueeze(2)
        total = log_mass.logsumexp(-1)
        return (log_mass - total.unsqueeze(-1)).exp() @ self.values, total
