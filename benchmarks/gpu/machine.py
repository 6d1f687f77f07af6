"""How a call is timed on a GPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache of an H200 (60 MB)
CALLS, WARM_UPS, REPEATS = 8, 2, 12


class Timer:
    """Median seconds of a call: the L2 cache flushed before each, CALLS of both in one CUDA graph, less a graph of the flushes.

    A graph, because launching from Python takes longer than these kernels; several calls, because starting a graph does too.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)
        self.flushing: float | None = None

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if self.flushing is None:
            self.flushing = self._replayed(lambda: None)
        call()  # compiles
        return (self._replayed(call) - self.flushing) / CALLS

    def _replayed(self, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.flush.zero_()
                call()
        times = []
        for turn in range(WARM_UPS + REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= WARM_UPS:
                times.append(begin.elapsed_time(end) / 1000)
        return statistics.median(times)


def copy_bandwidth(timer: Timer, device: str) -> float:
    """Bytes a second that a device copy reads and writes."""
    source = torch.empty((1 << 30) if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))
