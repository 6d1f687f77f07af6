"""Resident memory of a server and its children over time."""

import collections
import statistics
import threading
import time
from collections.abc import Sequence

import psutil

EVERY_SECONDS = 5.0
WARM_UP_SECONDS = 300.0
"""Allocators and caches still fill, of stock vLLM as well. A shorter life says nothing about growth."""
LEAST_SECONDS = 300.0
"""Of growth to be looked at after the warm-up."""


class Memory:
    """Samples the resident MiB of a process tree by process name until `stop`. Shared pages count once a process."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, collections.Counter[str]]] = []
        self._process = psutil.Process(pid)
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            now: collections.Counter[str] = collections.Counter()
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    now[process.name()] += process.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
            self.samples.append((time.monotonic() - self._start, now))

    def stop(self) -> dict[str, dict[str, float]]:
        """Growth after the warm-up by process name, and of all of them as "total"; empty after a short life."""
        self._ended.set()
        self._thread.join()
        steady = [(t, now) for t, now in self.samples if t >= WARM_UP_SECONDS]
        if not steady or steady[-1][0] - steady[0][0] < LEAST_SECONDS:
            return {}
        times, mib = zip(*steady, strict=True)
        found = {name: growth(times, [now[name] for now in mib]) for name in mib[0]}
        return found | {"total": growth(times, [now.total() for now in mib])}


def growth(seconds: Sequence[float], mib: Sequence[float]) -> dict[str, float]:
    """MiB at the beginning and at the end (means over a tenth), and the slope of a least-squares line."""
    tenth = max(1, len(mib) // 10)
    minutes = [s / 60 for s in seconds]
    return {
        "minutes": minutes[-1] - minutes[0],
        "first_mib": statistics.fmean(mib[:tenth]),
        "last_mib": statistics.fmean(mib[-tenth:]),
        "slope_mib_per_minute": statistics.linear_regression(minutes, mib).slope,
    }
