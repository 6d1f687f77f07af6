"""Resident memory of a server and its children over time."""

import statistics
import threading
import time

import psutil

EVERY_SECONDS = 5.0
WARM_UP_SHARE = 0.25
"""Of the first samples: allocators and caches still fill."""


class Memory:
    """Samples (seconds, MiB) of a process tree until `stop`. Shared pages are counted once a process (resident size)."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._process = psutil.Process(pid)
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.samples.append((time.monotonic() - self._start, total / 2**20))

    def stop(self) -> dict[str, float]:
        """MiB after the warm-up and at the end (means over a tenth), and the slope of a least-squares line between."""
        self._ended.set()
        self._thread.join()
        steady = self.samples[int(len(self.samples) * WARM_UP_SHARE) :]
        if len(steady) < 4:
            return {"minutes": 0.0}
        times, sizes = [t / 60 for t, _ in steady], [m for _, m in steady]
        slope, _ = statistics.linear_regression(times, sizes)
        tenth = max(1, len(sizes) // 10)
        return {
            "minutes": times[-1] - times[0],
            "first_mib": sum(sizes[:tenth]) / tenth,
            "last_mib": sum(sizes[-tenth:]) / tenth,
            "slope_mib_per_minute": slope,
        }
