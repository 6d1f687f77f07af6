"""How far the heads of a model look, measured by one pass over random tokens before the first request.

Random tokens that come twice, with others between: a head that copies finds the first time, a head that looks at its
neighbours or at the first tokens does not care. What a head gives to tokens that are neither near nor the first ones is its
reach; head_budgets.py makes budgets of it. No text is read, so reach is the model's alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index

from momentkv_vllm.head_budgets import Sizes, budgets, equal_until, grain_of, shared, tiles_of
from momentkv_vllm.kernels.cache_view import CacheView

REPEATED, BETWEEN = 384, 256
"""Tokens that come twice, and those between; less of each where the model's context is shorter."""
NEAR_SHARE = 4
"""Near are the last tokens before the query: as many as 1 / 4 of all."""
FIRST_TOKENS = 4
"""Not counted: most heads rest on them (attention sinks)."""
SEED = 0


class Probe:
    """Stands in for a layer's attention during the pass. `reach`: [kv heads], the largest of a KV head's query heads."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.reach: Tensor | None = None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *_args, **_kwargs) -> Tensor:
        """As an AttentionImpl's; nothing is cached."""
        return self.attend(query, key, value, output)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """Causal attention of one sequence into `output` [tokens, num_heads, head_dim], like `query`; key, value:
        [tokens, num_kv_heads, head_dim]."""
        q, k, v = (x.transpose(0, 1).float() for x in (query, key, value))
        tokens, groups = q.shape[1], q.shape[0] // k.shape[0]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)
        reach = torch.zeros(q.shape[0])
        for head in range(q.shape[0]):
            weights = (q[head] @ k[head // groups].T * self.scale).masked_fill_(later, -torch.inf).softmax(-1)
            output[:, head] = (weights @ v[head // groups]).to(output.dtype)
            far = weights.tril_(-(tokens // NEAR_SHARE))[-_repeated(tokens) :, FIRST_TOKENS:]
            reach[head] = far.sum(-1).mean()
        self.reach = reach.view(-1, groups).amax(1)
        return output


def _repeated(tokens: int) -> int:
    """Of the tokens at the end, those that have come before."""
    return tokens * REPEATED // (2 * REPEATED + BETWEEN)


def random_tokens(vocabulary: int, longest: int) -> Tensor:
    """[tokens] int64."""
    tokens = min(2 * REPEATED + BETWEEN, longest)
    repeated, generator = _repeated(tokens), torch.Generator().manual_seed(SEED)
    once = torch.randint(vocabulary, (tokens - repeated,), generator=generator)
    return torch.cat([once, once[:repeated]])


@contextmanager
def measured_layers(runner: Any) -> Iterator[None]:
    """Around the allocation of `runner`'s KV cache: layers with `head_budgets` "measured" know then what their heads hold."""
    config, layers = runner.vllm_config, runner.compilation_config.static_forward_context
    drafting = getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", ())
    names = [n for n, x in layers.items() if getattr(getattr(x, "impl", None), "measures_heads", False)]
    # The pass runs the model alone; heads of a drafter's layers hold as many tokens each.
    names = [n for n in names if n not in drafting]
    names.sort(key=extract_layer_index)
    impls = [layers[name].impl for name in names]
    reach = measure(runner, impls) if names else None
    yield
    if names:
        caches = [impl.view_of(layers[name].kv_cache) for name, impl in zip(names, impls, strict=True)]
        share_out(impls, caches, reach, config.model_config.max_model_len)


@torch.inference_mode()
def measure(runner: Any, impls: Sequence[Any]) -> Tensor:
    """[layers, kv heads] reach of `impls`, the layers of `runner`'s model (vllm/v1/worker/cpu_model_runner.py) in order."""
    from vllm.forward_context import set_forward_context

    config = runner.vllm_config
    ids = random_tokens(config.model_config.get_vocab_size(), config.model_config.max_model_len)
    probes = [Probe(impl.scale) for impl in impls]
    for impl, probe in zip(impls, probes, strict=True):
        impl.forward = probe.forward  # before the class's own
    with set_forward_context(None, config, num_tokens=len(ids)):
        runner.model(
            input_ids=ids.to(torch.int32),
            positions=torch.arange(len(ids)),
            intermediate_tensors=None,
            inputs_embeds=None,
        )
    for impl in impls:
        del impl.forward
    return torch.stack([probe.reach for probe in probes])


def share_out(impls: Sequence[Any], caches: Sequence[CacheView], reach: Tensor, longest: int) -> None:
    """Give every layer its `heads`: what they hold in `caches`, which stay where they are, by `reach` [layers, kv heads]."""
    schedule, packed = impls[0].layout.schedule, caches[0].packed
    capacity = shared(reach, schedule.store_tokens, grain_of(schedule.run_tokens), longest)
    watches = impls[0].policy.observes is not None
    observed = [impl.observing(c).data.data_ptr() if watches else 0 for impl, c in zip(impls, caches, strict=True)]
    addresses = torch.tensor([[c.kv.data_ptr(), at] for c, at in zip(caches, observed, strict=True)])
    sizes = Sizes(packed.raw.shape[2], caches[0].page_slots, packed.layout.tile_bytes)
    equal = equal_until(schedule.store_tokens, schedule.retire_tokens)
    tiles = tiles_of(capacity, schedule.store_tokens, packed.page_tiles)
    for impl, heads in zip(impls, budgets(capacity, tiles, addresses, sizes, equal), strict=True):
        impl.heads = heads
