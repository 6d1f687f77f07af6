"""Resident memory of a server and its children over time."""

import collections
import statistics
import threading
import time
from typing import Any

import psutil

EVERY_SECONDS = 5.0
WARM_UP_SECONDS = 300.0
"""Allocators and caches still fill, of stock vLLM as well. A shorter life says nothing about growth."""
LEAST_SECONDS = 300.0
"""Of growth to be looked at after the warm-up."""


class Memory:
    """Samples the resident MiB of a process tree by process name until `stop`. Shared pages count once a process."""

    def __init__(self, pid: int) -> None:
        self.seconds: list[float] = []
        self.mib: dict[str, list[float]] = collections.defaultdict(list)
        self._process = psutil.Process(pid)
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
                now = [(process.name(), process.memory_info().rss / 2**20) for process in tree]
            except psutil.NoSuchProcess:
                continue
            self.seconds.append(time.monotonic() - self._start)
            for name, mib in now:
                self.mib[name].append(mib)

    def stop(self) -> dict[str, dict[str, float]]:
        """Growth after the warm-up by process name, and of all of them as "total"; empty after a short life."""
        self._ended.set()
        self._thread.join()
        steady = sum(t < WARM_UP_SECONDS for t in self.seconds)
        times = self.seconds[steady:]
        if not times or times[-1] - times[0] < LEAST_SECONDS:
            return {}
        alive = {name: mib[steady:] for name, mib in self.mib.items() if len(mib) == len(self.seconds)}
        found = {name: growth(times, mib) for name, mib in alive.items()}
        return found | {"total": growth(times, [sum(now) for now in zip(*alive.values(), strict=True)])}


def growth(seconds: list[float], mib: list[float]) -> dict[str, Any]:
    """MiB at the beginning and at the end (means over a tenth), and the slope of a least-squares line."""
    tenth = max(1, len(mib) // 10)
    minutes = [s / 60 for s in seconds]
    return {
        "minutes": minutes[-1] - minutes[0],
        "first_mib": statistics.fmean(mib[:tenth]),
        "last_mib": statistics.fmean(mib[-tenth:]),
        "slope_mib_per_minute": statistics.linear_regression(minutes, mib).slope,
    }
