"""KL divergence between two next-token distributions of which only the likeliest tokens are known."""

import math
from collections.abc import Hashable, Mapping, Sequence

Known = Mapping[Hashable, float]
"""Log-probability of each listed token."""

LEAST_MASS = 1e-6


def truncated_kl(full: Known, other: Known) -> float:
    """KL(full || other) with all tokens that `full` does not list as one event; never negative.

    A token missing from `other` counts as its least listed one: an upper bound of what it can have.
    """
    least = min(other.values())
    pairs = [(lp, other.get(token, least)) for token, lp in full.items()]
    rest_p = max(LEAST_MASS, 1 - sum(math.exp(p) for p, _ in pairs))
    rest_q = max(LEAST_MASS, 1 - sum(math.exp(q) for _, q in pairs))
    total = sum(math.exp(p) * (p - q) for p, q in pairs) + rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)


def mean_kl(full: Sequence[Known], other: Sequence[Known]) -> float:
    """Mean over places; both sequences list the same places."""
    return sum(truncated_kl(p, q) for p, q in zip(full, other, strict=True)) / len(full)
