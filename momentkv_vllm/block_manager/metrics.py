"""Page counters of the engine core, written where the API server's /metrics finds them.

vLLM sends only its own SchedulerStats from the engine core to the API server. These figures travel instead through files in
prometheus_client's multi-process format: in PROMETHEUS_MULTIPROC_DIR when vLLM runs several API servers (its /metrics reads
that directory), otherwise in a directory of ours that `serve_metrics` adds to the API server's registry. Names start with
`momentkv:` because vLLM unregisters collectors named `vllm`.
"""

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from momentkv_vllm.block_manager.spec import MomentKVSpec

DIRECTORY_VARIABLE = "MOMENTKV_METRICS_DIR"
"""Environment variable through which the engine core inherits the API server's directory."""

_served: str | None = None
"""The directory that this process shows on /metrics."""


@dataclass(frozen=True)
class Metric:
    """Prometheus name without suffix, type ("counter" or "gauge") and help text."""

    name: str
    kind: str
    help: str


RETIRED_PAGES = Metric("momentkv:retired_pages", "counter", "KV pages freed to the pool by eviction.")
EVICTED_TOKENS = Metric("momentkv:evicted_tokens", "counter", "Tokens folded into moments, per KV head.")
LIVE_PAGES = Metric("momentkv:live_pages", "gauge", "KV pages that sequences own now.")
EVICTING_SEQUENCES = Metric("momentkv:evicting_sequences", "gauge", "Sequences past their budget now.")
METRICS = (RETIRED_PAGES, EVICTED_TOKENS, LIVE_PAGES, EVICTING_SEQUENCES)


class PageMetrics:
    """The engine core's writer; without a directory (offline use) it counts and writes nothing."""

    def __init__(self, spec: MomentKVSpec) -> None:
        self._labels = {"model_name": spec.model_name, "engine": str(spec.engine)}
        self.values = dict.fromkeys(METRICS, 0.0)
        self._files: dict[str, MmapedDict] = {}
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(DIRECTORY_VARIABLE)
        if directory and os.path.isdir(directory):
            # Our own process part in the name: prometheus_client maps `counter_<pid>.db` itself.
            owner = f"momentkv-{os.getpid()}"
            self._files["counter"] = MmapedDict(os.path.join(directory, f"counter_{owner}.db"))
            self._files["gauge"] = MmapedDict(os.path.join(directory, f"gauge_sum_{owner}.db"))
        for metric in METRICS:
            self._write(metric)

    def retired(self, pages: int, tokens: int, sequences: int) -> None:
        """Pages were freed and tokens evicted; `sequences` are past their budget now."""
        self.values[RETIRED_PAGES] += pages
        self.values[EVICTED_TOKENS] += tokens
        self._write(RETIRED_PAGES)
        self._write(EVICTED_TOKENS)
        self._set(EVICTING_SEQUENCES, sequences)

    def live(self, pages: int, sequences: int) -> None:
        """Pages owned and sequences past their budget now."""
        self._set(LIVE_PAGES, pages)
        self._set(EVICTING_SEQUENCES, sequences)

    def _set(self, metric: Metric, value: float) -> None:
        if self.values[metric] != value:
            self.values[metric] = value
            self._write(metric)

    def _write(self, metric: Metric) -> None:
        file = self._files.get(metric.kind)
        if file is None:
            return
        sample = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        key = mmap_key(metric.name, sample, list(self._labels), list(self._labels.values()), metric.help)
        file.write_value(key, self.values[metric], 0.0)


def serve_metrics() -> None:
    """In the API server, before the engine core starts: make its /metrics show the engine core's figures. Idempotent."""
    global _served
    # Not decided by the variable: a server started from another vLLM process inherits that one's.
    if _served or os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    directory = _served = tempfile.mkdtemp(prefix="momentkv-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ[DIRECTORY_VARIABLE] = directory
    MultiProcessCollector(REGISTRY, directory)
