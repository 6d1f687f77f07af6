"""A decode step's events on a GPU: all layers retire together when the last of them has attended, in one launch.

A layer's events touch its own cache only, which nobody reads again before the next step. Inside a captured graph, too.
"""

import torch

from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import LayersOf, RetireWork


class LayerTable:
    """Where layers lie, kept on the device while they stay there."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.host = self.there = torch.zeros(0, 2, dtype=torch.int64)
        self.captured: list[torch.Tensor] = []

    def of(self, caches: list[CacheView], observed: list[Observed | None]) -> torch.Tensor:
        """[layers, 2] int64 on the device: bytes from the first layer's cache and observations to each layer's."""
        kept = [x.data.data_ptr() if x else 0 for x in observed]
        places = torch.tensor([[c.kv.data_ptr(), at] for c, at in zip(caches, kept, strict=True)])
        host = places - places[0]
        if torch.equal(host, self.host):
            return self.there
        on_gpu = self.device.type == "cuda"
        host = host.pin_memory() if on_gpu else host
        there = host.to(self.device, non_blocking=True)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            # What a graph copies is there once it runs: no other graph may rely on it, and what it copies from must stay.
            self.captured.append(host)
            return there
        self.host, self.there = host, there
        return there


class RetireAtEnd:
    """Of one step."""

    def __init__(self, work: RetireWork, layers: int, table: LayerTable) -> None:
        self.work, self.layers, self.table = work, layers, table
        self.caches: list[CacheView] = []
        self.observed: list[Observed | None] = []

    def attended(self, impl: EvictingImpl, cache: CacheView) -> None:
        """A layer has. With the last one, all retire."""
        self.caches.append(cache)
        self.observed.append(impl._observed_in(cache))
        if len(self.caches) < self.layers:
            return
        layers = LayersOf(self.caches, self.observed, self.table.of(self.caches, self.observed))
        impl.kernels.consolidate_layers(layers, self.work, impl.policy, impl.config.sink_tokens, impl.scale)
        self.caches, self.observed = [], []
