"""What only a worker sees: how long a consolidation takes, and how much attention the moments carry."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from momentkv_vllm import moments as mo
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.worklists import AttendWork, Round
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.metrics import CONSOLIDATE_SECONDS, CORRECTION, EVICTED_MASS, WORKER_METRICS, MetricWriter

SAMPLE_EVERY = 127
"""Layer visits with an event between two samples; a prime, so that every layer of a model takes its turn."""

SAMPLE_ROWS = 2
"""Most sequences looked at in a sample."""

LEAST_RETAINED_MASS = 1e-3
"""Where the moments carry more than all but this, what attention had returned without them is not computable from the output."""


@dataclass
class Attended:
    """A call of the kernels' `attend` (kernels/reference.py): what it was given, `output` and `lse` as it wrote them."""

    cache: CacheView
    query: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor
    attend: AttendWork
    scale: float
    corrected: bool


class Monitor:
    """The worker's figures of one engine. Sampling reads what attention has computed anyway: it changes no token."""

    def __init__(self, spec: MomentKVSpec) -> None:
        self.metrics = MetricWriter(WORKER_METRICS, spec.model_name, spec.engine)
        self._visits = 0

    def due(self, round_: Round) -> bool:
        """Whether this layer's attention of a round is to be sampled: every `SAMPLE_EVERY`-th visit with an event."""
        if not round_.retires:
            return False
        self._visits += 1
        return self._visits % SAMPLE_EVERY == 0

    def consolidated(self, seconds: list[float]) -> None:
        """Consolidations took so long, each."""
        for value in seconds:
            self.metrics.observe(CONSOLIDATE_SECONDS, value)

    def sample(self, seen: Attended) -> None:
        """Look at the last query of the first rows that have evicted."""
        attend = seen.attend
        rows = (attend.num_evicted > 0).nonzero().flatten()[:SAMPLE_ROWS]
        if attend.observe_only or not len(rows) or not seen.cache.record_layout.has_means:
            return
        mass, change = measure(seen, rows)
        for value in mass.tolist():
            self.metrics.observe(EVICTED_MASS, value)
        for value in change.tolist() if seen.corrected else ():
            self.metrics.observe(CORRECTION, value)


def apart(rounds: list[Round], monitor: Monitor | None, each: bool) -> Iterator[tuple[list[Round], Monitor | None]]:
    """Rounds in order, those together that one call may run; a monitor where it is to sample the round that it comes with.

    each: every round by itself.
    """
    together: list[Round] = []
    for round_ in rounds:
        sampling = monitor if monitor and monitor.due(round_) else None
        if not sampling and not each:
            together.append(round_)
            continue
        if together:
            yield together, None
            together = []
        yield [round_], sampling
    if together:
        yield together, None


def measure(seen: Attended, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass that the moments of `rows` carry for the last query of each, and the relative size of the correction.

    Returns:
        ([rows] mean over heads of the share m of attention, [rows] norm of (o - o_r) over norm of o). Attention merges
        o = (1 - m) o_r + m e, with e the moments' part and o_r what the retained tokens alone give, so
        o - o_r = m / (1 - m) (e - o).
    """
    cache, attend = seen.cache, seen.attend
    token = (attend.first_token + attend.num_queries - 1)[rows]
    query, output, lse = seen.query[token], seen.output[token], seen.lse[token]
    stored = None if attend.stored is None else attend.stored[rows]
    record = cache.read_moments(attend.moment_pages[rows], cache.evicted(stored, attend.num_evicted[rows]))
    heads = record.mean_key.shape[1]
    grouped = query.float().unflatten(1, (heads, -1))
    evicted, log_mass = mo.partial(record, grouped, seen.scale, cache.softcap)
    total = lse.unflatten(1, (heads, -1))
    if not seen.corrected:
        total = torch.logaddexp(total, log_mass)
    share = (log_mass - total).exp().clamp(max=1.0)
    merged = output.float().unflatten(1, (heads, -1))
    odds = (share / (1 - share).clamp(min=LEAST_RETAINED_MASS)).unsqueeze(-1)
    change = (odds * (evicted - merged)).flatten(1).norm(dim=1)
    return share.flatten(1).mean(1), change / merged.flatten(1).norm(dim=1).clamp(min=1e-30)
