"""Every Prometheus metric of ours (name, type, help, labels), and how a figure gets from its process to /metrics.

vLLM sends only its own SchedulerStats from the engine core to the API server, and nothing from the workers. Our figures travel
through files in prometheus_client's multi-process format: in PROMETHEUS_MULTIPROC_DIR when vLLM runs several API servers (each
one's /metrics reads that directory, so all say the same), otherwise in a directory of ours that `serve_metrics` adds to the API
server's registry. A write is a store into mapped memory. Names start with `momentkv:` because vLLM unregisters `vllm:` ones.

Every figure has one writer per engine (data-parallel rank): its core for the books, the first tensor-parallel rank of
each pipeline stage for what only a worker sees (the others evict in lockstep, each its own heads), so sums count nothing twice.
"""

import atexit
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from momentkv_vllm.environment import METRICS_DIR

_served: str | None = None
"""The directory that this process shows on /metrics."""


@dataclass(frozen=True)
class Metric:
    """Prometheus name without suffix, type, help; one label beside model_name and engine, if any; a histogram's upper bounds."""

    name: str
    kind: str
    help: str
    label: str = ""
    label_values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def shown(self) -> str:
        """Name as in queries; a histogram's ends in _bucket, _sum or _count there."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def series(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Sample name and own labels of each of its time series, in the order of `MetricWriter`'s indices."""
        if self.bounds:
            yield from ((f"{self.name}_bucket", {"le": le}) for le in (*map(str, self.bounds), "+Inf"))
            yield f"{self.name}_sum", {}
        elif self.label:
            yield from ((self.shown, {self.label: value}) for value in self.label_values)
        else:
            yield self.shown, {}


RATIO_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SECONDS_BOUNDS = (1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PAGE_KINDS = ("store", "moments", "window")
SEQUENCE_STATES = ("below_budget", "evicting")
TOKEN_KINDS = ("held", "evicted")
CLASS_LABEL = "kv_budget"

RETIRED_PAGES = Metric("momentkv:retired_pages", "counter", "KV pages freed to the pool by eviction.")
EVICTED_TOKENS = Metric("momentkv:evicted_tokens", "counter", "Tokens folded into moments, per KV head.")
FREED_BYTES = Metric("momentkv:freed_bytes", "counter", "Bytes of those pages, over all layers and ranks.")
LIVE_PAGES = Metric(
    "momentkv:live_pages", "gauge",
    "KV pages that sequences own now, by `kind` (store, moments, window); window counts all exact pages, also below the budget.",
    "kind", PAGE_KINDS,
)  # fmt: skip
SEQUENCES = Metric(
    "momentkv:sequences",
    "gauge",
    "Sequences that own pages now, by `state` (below_budget, evicting).",
    "state",
    SEQUENCE_STATES,
)
TOKENS = Metric(
    "momentkv:tokens", "gauge",
    "Tokens that those sequences have had, of one KV head and in whole pages, by `kind` (held, evicted).",
    "kind", TOKEN_KINDS,
)  # fmt: skip
STOCK_PAGES = Metric("momentkv:stock_pages", "gauge", "Pages that stock vLLM would hold for the same sequences now.")
POOL_PAGES = Metric("momentkv:pool_pages", "gauge", "Pages of the KV pool, free ones included.")
BUDGET_PAGES = Metric("momentkv:budget_pages", "gauge", "Budget of one sequence, in pages.")
HELD_TOKENS = Metric(
    "momentkv:budget_held_tokens",
    "gauge",
    "Tokens that a sequence holds at its budget; a quantised store holds more than pages.",
)
STATE_LOOKUPS = Metric("momentkv:state_lookups", "counter", "Texts longer than the budget that were admitted.")
STATE_HITS = Metric("momentkv:state_hits", "counter", "Those that went on from a cached state.")
STATE_SAVED_TOKENS = Metric("momentkv:state_saved_tokens", "counter", "Tokens that were not read again thanks to it.")
STATE_MISSED_TOKENS = Metric(
    "momentkv:state_missed_tokens", "counter", "Tokens that an earlier text had too, read again for want of a state."
)
STATES = Metric("momentkv:states", "gauge", "States in the prefix cache now.")
CLASS_BUDGET = Metric("momentkv:class_budget_pages", "gauge", "Most pages of a sequence, by budget class.", CLASS_LABEL)
CLASS_PAGES = Metric(
    "momentkv:class_live_pages", "gauge", "KV pages that sequences own now, by budget class.", CLASS_LABEL
)
CLASS_SEQUENCES = Metric(
    "momentkv:class_sequences", "gauge", "Sequences that own pages now, by budget class.", CLASS_LABEL
)
CLASS_EVICTED = Metric(
    "momentkv:class_evicted_tokens", "counter", "Tokens folded into moments, per KV head, by budget class.", CLASS_LABEL
)
CLASS_METRICS = (CLASS_BUDGET, CLASS_PAGES, CLASS_SEQUENCES, CLASS_EVICTED)
"""Their label's values are the classes that a server declares (`of_classes`); the other figures are sums over them."""
CORE_METRICS = (
    RETIRED_PAGES, EVICTED_TOKENS, FREED_BYTES, LIVE_PAGES, SEQUENCES, TOKENS, STOCK_PAGES, POOL_PAGES, BUDGET_PAGES, HELD_TOKENS,
    STATE_LOOKUPS, STATE_HITS, STATE_SAVED_TOKENS, STATE_MISSED_TOKENS, STATES,
)  # fmt: skip
"""Written by the engine core (block_manager/metrics.py)."""

CONSOLIDATE_SECONDS = Metric(
    "momentkv:consolidate_seconds", "histogram",
    "Duration of one consolidation: one layer, all sequences that retire pages together.",
    bounds=SECONDS_BOUNDS,
)  # fmt: skip
EVICTED_MASS = Metric(
    "momentkv:evicted_mass_ratio", "histogram",
    "Share of a query's attention that the moments carry, mean over heads (sampled; estimated by the moments).",
    bounds=RATIO_BOUNDS,
)  # fmt: skip
CORRECTION = Metric(
    "momentkv:correction_ratio", "histogram",
    "Size of the correction: norm of the change of a query's attention output over that of the output (sampled).",
    bounds=RATIO_BOUNDS,
)  # fmt: skip
WORKER_METRICS = (CONSOLIDATE_SECONDS, EVICTED_MASS, CORRECTION)
"""Written by the first tensor-parallel rank of each pipeline stage of an engine (attention/monitor.py)."""

METRICS = (*CORE_METRICS, *CLASS_METRICS, *WORKER_METRICS)


def of_classes(names: Sequence[str]) -> list[Metric]:
    """`CLASS_METRICS` for classes of these names, in their order."""
    return [replace(metric, label_values=tuple(names)) for metric in CLASS_METRICS]


class MetricWriter:
    """One process's figures; without a directory (offline use) it counts and writes nothing.

    `values` [metric, index]: index numbers the time series of `Metric.series`.
    """

    def __init__(self, metrics: Sequence[Metric], model_name: str, engine: int) -> None:
        self.values: dict[tuple[Metric, int], float] = {}
        self._files: dict[str, MmapedDict] = {}
        self._keys: dict[tuple[Metric, int], str] = {}
        for metric in metrics:
            self._open(metric.kind)
            for index, (name, own) in enumerate(metric.series()):
                labels = {"model_name": model_name, "engine": str(engine), **own}
                self._keys[metric, index] = mmap_key(
                    metric.name, name, list(labels), list(labels.values()), metric.help
                )
                self.values[metric, index] = 0.0
                self._write(metric, index)

    def add(self, metric: Metric, amount: float, index: int = 0) -> None:
        if amount:
            self.values[metric, index] += amount
            self._write(metric, index)

    def set(self, metric: Metric, value: float, index: int = 0) -> None:
        if self.values[metric, index] != value:
            self.values[metric, index] = value
            self._write(metric, index)

    def observe(self, metric: Metric, value: float) -> None:
        """Count `value` in a histogram. The files hold buckets one by one; the collector accumulates them."""
        self.add(metric, 1, bisect_left(metric.bounds, value))
        self.add(metric, value, len(metric.bounds) + 1)

    def _open(self, kind: str) -> None:
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or METRICS_DIR.get()
        if kind in self._files or not directory or not os.path.isdir(directory):
            return
        # Of a gauge the newest writer counts: a directory of the user's may still hold files of an earlier run.
        prefix = "gauge_mostrecent" if kind == "gauge" else kind
        # Our own process part in the name: prometheus_client maps `counter_<pid>.db` itself.
        self._files[kind] = MmapedDict(os.path.join(directory, f"{prefix}_momentkv-{os.getpid()}.db"))

    def _write(self, metric: Metric, index: int) -> None:
        file = self._files.get(metric.kind)
        if file is not None:
            now = time.time() if metric.kind == "gauge" else 0.0
            file.write_value(self._keys[metric, index], self.values[metric, index], now)


def serve_metrics() -> None:
    """In the API server, before the engine core starts: make its /metrics show the engine core's figures. Idempotent."""
    global _served
    # Not decided by the variable: a server started from another vLLM process inherits that one's.
    if _served or os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    directory = _served = tempfile.mkdtemp(prefix="momentkv-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    METRICS_DIR.set(directory)  # engine core and workers inherit it
    MultiProcessCollector(REGISTRY, directory)


def read_metrics() -> dict[str, float]:
    """This server's figures summed over engines, by name and own label: `momentkv:live_pages{kind="store"}`; no buckets."""
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or _served
    found: dict[str, float] = {}
    if not directory:
        return found
    for family in MultiProcessCollector.merge(glob(os.path.join(directory, "*_momentkv-*.db"))):
        for sample in family.samples:
            if "le" in sample.labels:
                continue
            own = [f'{{{k}="{v}"}}' for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            key = sample.name + "".join(own)
            found[key] = found.get(key, 0.0) + sample.value
    return found
