"""Every kernel that a serving GPU may need, launched once before the first request: Triton compiles at a first launch."""

from types import SimpleNamespace

import torch
from torch import Tensor

from momentkv_vllm.attention.layer import EvictingImpl
from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.attention.upload import upload_step
from momentkv_vllm.kv_spec import MomentKVSpec
from momentkv_vllm.page_schedule import cdiv


def warm_up(impl: EvictingImpl, planner: StepPlanner, spec: MomentKVSpec, device: torch.device) -> None:
    """Steps of two sequences of zeros in a cache of their own, as if `impl` served them; what they leave is thrown away.

    The first reads a prompt across its first event, a later one and what catches up with the finer grain; the second retires in
    decode beside it, then both decode. Captured steps compile what they need themselves.
    """
    page_size, first = spec.block_size, spec.schedule.first_event_tokens
    prompt = first + spec.schedule.prefill_retire_tokens + spec.schedule.retire_tokens + 2
    columns = cdiv(prompt + page_size, page_size)
    pages = torch.arange(2 * columns + 1)
    table, shape = pages[1:].view(2, columns), (len(pages), spec.num_kv_heads, page_size, 2 * spec.head_size)
    cache = torch.zeros(shape, dtype=spec.dtype, device=device)
    served, impl.heads = impl.heads, [heads and heads.on_trial() for heads in impl.heads]
    lens = [0, 0]
    for new in ([prompt, first - 1], [2, 1], [1, 1]):
        lens = [a + b for a, b in zip(lens, new, strict=True)]
        step = planner.build([0, new[0], sum(new)], lens, [prompt, 0], table)
        upload_step(step, [], pages.to(device))
        query = torch.zeros(sum(new), impl.num_heads, spec.head_size, dtype=spec.dtype, device=device)
        key = query[:, : spec.num_kv_heads]
        impl.do_kv_cache_update(None, key, key, cache, _slots(table, lens, new, page_size).to(device))
        metadata = SimpleNamespace(eviction=step, stock_part=None)
        impl.forward(None, query, key, key, cache, metadata, torch.empty_like(query))
    impl.observed, impl.heads = None, served


def _slots(table: Tensor, lens: list[int], new: list[int], page_size: int) -> Tensor:
    """Where a step's tokens lie: the last new[i] of lens[i]."""
    positions = [torch.arange(end - n, end) for end, n in zip(lens, new, strict=True)]
    return torch.cat([table[i, p // page_size] * page_size + p % page_size for i, p in enumerate(positions)])
