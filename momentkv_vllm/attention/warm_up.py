"""Every kernel that a serving GPU may need, launched once before the first request: Triton compiles at a first launch."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from momentkv_vllm.attention.cuda_backend import CudaEvictingBuilder
from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.attention.upload import upload_step
from momentkv_vllm.page_schedule import cdiv


@torch.inference_mode()
def warm_up_runner(runner: Any) -> None:
    """Of the layers of `runner` that our CUDA backend serves, one of each kind, when their KV cache is there and they have been
    told what is measured (attention/measuring.py): which kernels they need depends on both."""
    layers = runner.compilation_config.static_forward_context
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.get_metadata_builder()
        if isinstance(builder, CudaEvictingBuilder) and builder.planner is not None:
            layer = layers[group.layer_names[0]]
            warm_up(layer.impl, builder.planner, layer.kv_cache)


def warm_up(impl: EvictingImpl, planner: StepPlanner, cache: Tensor) -> None:
    """Steps of two sequences of zeros in the layer's own `cache` [pages, kv_heads, page_size, 2 * head_dim], in which nobody
    has a page yet. Where heads have budgets of their own, tiles in the caches of other layers are written likewise.

    The first reads a prompt across its first event, a later one and what catches up with the finer grain; the second retires in
    decode beside it, then both decode. Captured steps compile what they need themselves.
    """
    (schedule, *_), (count, kv_heads, page_size, width), device = planner.schedules, cache.shape, cache.device
    first = schedule.first_event_tokens
    prompt = first + schedule.prefill_retire_tokens + schedule.retire_tokens + 2
    columns = cdiv(prompt + page_size, page_size)
    places = torch.arange(1, 2 * columns + 1).view(2, columns)
    # A small cache lends pages twice: what is computed is wrong then, and thrown away anyhow.
    pages = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(2 * columns) % (count - 1)])
    lens = [0, 0]
    for new in ([prompt, first - 1], [2, 1], [1, 1]):
        lens = [a + b for a, b in zip(lens, new, strict=True)]
        query = torch.zeros(sum(new), impl.num_heads, width // 2, dtype=cache.dtype, device=device)
        key = query[:, :kv_heads]
        impl.do_kv_cache_update(None, key, key, cache, _slots(pages[places], lens, new, page_size).to(device))
        # A list may be observed or not.
        for observed in sorted({False, planner.observe}):
            step = planner.build([0, new[0], sum(new)], lens, [prompt, 0], places)
            upload_step(step, [], pages.to(device))
            for work in (work for round_ in step.rounds for work in round_.attends):
                work.observe_from = work.num_queries if observed else None
                work.restart = torch.zeros_like(work.num_queries, dtype=torch.bool) if observed else None
            metadata = SimpleNamespace(eviction=step, stock_part=None)
            impl.forward(None, query, key, key, cache, metadata, torch.empty_like(query))
    cache[pages.to(device)] = 0


def _slots(table: Tensor, lens: list[int], new: list[int], page_size: int) -> Tensor:
    """Where a step's tokens lie: the last new[i] of lens[i]."""
    positions = [torch.arange(end - n, end) for end, n in zip(lens, new, strict=True)]
    return torch.cat([table[i, p // page_size] * page_size + p % page_size for i, p in enumerate(positions)])
