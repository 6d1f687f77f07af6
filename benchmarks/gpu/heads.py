"""Decode layers whose heads have budgets of their own: each head beside the reference's layer of that head alone, which has no
tiles but its own."""

from dataclasses import replace
from typing import Any

import graph
import torch
from shape import SINKS

from momentkv_vllm.head_budgets import Tile, equal_until, shared, tiles_of
from momentkv_vllm.kernels import select
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.kernels.worklists import LayersOf, mapped
from momentkv_vllm.page_schedule import cdiv

STORE, LAYERS, LONGEST = "int4", 2, 1 << 20
TINY_LONGEST = 120
"""All heads, and a head alone, then hold so few tokens that attention counts little (policies/key_direction.py); where this is no
limit, even a sixth of an equal share is too much for that."""


def share_out(layers: list[graph.Layer], longest: int = LONGEST) -> list[list[list[Tile]]]:
    """Gives `layers`, whose stores are quantised, heads that look differently far; the tiles of each. Their sequences go on two
    events later: with a full store heads may still hold as many."""
    first, tokens = layers[0].cache, layers[0].schedule.store_tokens
    reach = torch.rand(len(layers), first.keys.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
    capacity = shared(reach, tokens, 8, longest)
    equal = equal_until(tokens, layers[0].schedule.prefill_retire_tokens)
    caches, observed = [x.cache for x in layers], [x.mass for x in layers]
    for layer, held in zip(layers, budgets_in(caches, observed, capacity, tokens, equal), strict=True):
        layer.cache.heads = held
        layer.begin += 2 * layer.schedule.retire_tokens
    return tiles_of(capacity, tokens, first.packed.page_tiles)


class Alone:
    """What the reference makes of one head of a layer that is about to go on, full stores and all."""

    def __init__(self, layers: list[graph.Layer], number: int, head: int, tiles: list[Tile]) -> None:
        self.layer, self.head, self.family = layers[number], head, select("reference")
        cache, store_pages = self.layer.cache, self.layer.schedule.store_pages
        pages, rows, packed = len(cache.kv), self.layer.rows, cache.packed
        self.capacity = int(cache.heads.capacity[head])
        extra = max(0, cdiv(len(tiles), packed.page_tiles) - store_pages)
        more = pages + torch.arange(rows * (extra + 1), device=cache.kv.device).view(rows, extra + 1)
        old = self.layer.table[:, :store_pages].long()
        # The record has a page of its own: the store's last page is full of tiles here.
        self.store, self.record = torch.cat([old, more[:, 1:]], 1), more[:, :1].contiguous()
        kv = cache.kv.new_zeros(pages + more.numel(), 1, *cache.kv.shape[2:])
        kv[:pages] = cache.kv[:, head : head + 1]
        self.cache = CacheView.of_vllm_gpu(kv, cache.record_layout, cache.packed_layout)
        self.mass, size = Observed.of(self.cache, "mass"), packed.layout.tile_bytes
        self.cache.raw[self.record[:, 0], 0] = cache.raw[old[:, -1], head]
        for n, tile in enumerate(tiles):
            held = layers[tile.layer].cache.raw[old[:, tile.page], tile.head, tile.number * size :][:, :size]
            to = self.store[:, n // packed.page_tiles]
            at = n % packed.page_tiles * size
            self.cache.raw[to, 0, at : at + size] = held

    def forward(self) -> torch.Tensor:
        """Its queries' output."""
        layer, own = self.layer, slice(self.head, self.head + 1)
        (round_work,), (retire,) = layer.work.attends, layer.work.retires
        gone = round_work.stored + round_work.num_evicted.long()
        assert (gone > layer.cache.heads.equal_tokens).all(), "all heads hold as many"
        stored = gone.clamp(max=self.capacity)
        told = {"stored": stored, "num_evicted": (gone - stored).float(), "moment_pages": self.record}
        skipped = layer.schedule.store_pages
        pages = torch.cat([self.store, round_work.pages[:, skipped:]], 1)
        attend = replace(round_work, pages=pages, store_pages=self.store.shape[1], **told)
        groups = layer.query.shape[1] // layer.cache.keys.shape[1]
        query = layer.query[:, self.head * groups :][:, :groups].contiguous()
        output = torch.empty_like(query)
        self.family.write(self.cache, layer.key[:, own], layer.value[:, own], layer.slots, self.mass)
        self.family.attend_and_observe(self.cache, self.mass, query, output, attend, layer.scale, True)
        due = (retire.retiring_pages >= 0).any(1)
        if due.any():
            retire = replace(retire, store_pages=self.store, store_tokens=self.capacity, due=None, **told)
            retire = mapped(retire, lambda _, x: x[due])
            self.family.consolidate(self.cache, self.mass, retire, layer.policy, SINKS, layer.scale)
        return output


def life(family, device: str, tiny: bool) -> dict[str, Any]:
    """Steps across events, on a GPU replayed from a graph; all layers retire in one launch."""
    rows, heads, groups, d, budget = (2, 2, 2, 32, 64) if tiny else (4, 4, 4, 128, 512)
    layers = [graph.Layer(family, device, STORE, rows, heads, groups, d, budget, full=True) for _ in range(LAYERS)]
    layers[1].cache.kv.copy_(layers[1].cache.kv.flip(0))
    tiles = share_out(layers, TINY_LONGEST if tiny else LONGEST)
    together = graph.together_of(layers, device)
    for layer in layers:
        layer.prepare(0)
    alone = [Alone(layers, n, head, tiles[n][head]) for n in range(LAYERS) for head in range(heads)]
    go = _replayed(layers, together) if device == "cuda" else lambda: graph.forward(layers, together)
    worst, retired, steps = 0.0, 0, 6 if tiny else layers[0].schedule.retire_tokens + 20
    for step in range(steps):
        for layer in layers:
            layer.prepare(step)
        want = [one.forward() for one in alone]
        go()
        retired += layers[0].retired()
        for one, right in zip(alone, want, strict=True):
            got = one.layer.output[:, one.head * groups :][:, :groups].float()
            error = ((got - right.float()).norm() / right.float().norm()).item()
            assert error <= graph.STORES[STORE][2], f"{family.name}, head {one.head}, step {step}: {error:.2e}"
            worst = max(worst, error)
    assert retired > 0, "nothing retired"
    held = sorted(int(x) for cache in together.caches for x in cache.heads.capacity)
    assert held[0] < held[-1], "all heads hold as much"
    return {"heads": held, "steps": steps, "retired_pages": retired, "worst_relative_difference": worst}


def _replayed(layers: list[graph.Layer], together: LayersOf):
    """A step as a captured graph; what was tried leaves nothing behind."""
    before = [(layer.cache.kv.clone(), layer.mass.data.clone()) for layer in layers]
    graph.forward(layers, together)  # compiles
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        graph.forward(layers, together)
    for layer, (kv, mass) in zip(layers, before, strict=True):
        layer.cache.kv.copy_(kv), layer.mass.data.copy_(mass)
    return captured.replay
