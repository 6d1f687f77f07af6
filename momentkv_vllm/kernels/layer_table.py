"""Where the layers of a step lie, for kernels that work on all of them."""

import torch

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed


class LayerTable:
    """Where layers lie, kept on the device while they stay there."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.host = self.there = torch.zeros(0, dtype=torch.int64)
        self.captured: list[torch.Tensor] = []

    def of(self, caches: list[CacheView], observed: list[Observed | None]) -> torch.Tensor:
        """[layers, 5] int64 on the device, LayersOf.offsets of worklists.py."""
        places = torch.tensor([_addresses(cache, seen) for cache, seen in zip(caches, observed, strict=True)])
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


def _addresses(cache: CacheView, observed: Observed | None) -> list[int]:
    places, capacity = (cache.heads.places, cache.heads.capacity) if cache.heads else (None, None)
    found = cache.kv, observed.data if observed else None, places, capacity, cache.feedback
    return [0 if x is None else x.data_ptr() for x in found]
