"""A decode step's events on a GPU: all layers retire together when the last of them has attended, in one launch.

A layer's events touch its own cache, and tiles that an earlier one has lent (head_budgets.py); nobody reads these again before
the next step, and no tile is read and written in one launch (`equal_until`). Inside a captured graph, too.
"""

from dataclasses import replace

from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.layer_table import LayerTable
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import LayersOf, RetireWork


class RetireAtEnd:
    """Of one step."""

    def __init__(self, work: RetireWork, layers: int, table: LayerTable) -> None:
        self.work, self.layers, self.table = work, layers, table
        self.caches: list[CacheView] = []
        self.observed: list[Observed | None] = []

    def attended(self, impl: EvictingImpl, cache: CacheView) -> None:
        """A layer has. With the last one, all retire."""
        self.caches.append(replace(cache, heads=impl.heads[self.work.budget_class] if impl.heads else None))
        self.observed.append(impl._observed_in(cache))
        if len(self.caches) < self.layers:
            return
        layers = LayersOf(self.caches, self.observed, self.table.of(self.caches, self.observed))
        impl.kernels.consolidate_layers(layers, self.work, impl.policy, impl.config.sink_tokens, impl.scale)
        self.caches, self.observed = [], []
