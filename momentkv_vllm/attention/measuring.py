"""Measures what the heads of a model do, once, before the first request: how far they look, by which stores are shared out
(head_budgets.py), and where their queries point, by which keys are rounded (key_rounding.py).

The model reads random tokens, and some text, as it reads a prompt: every layer that attends is stood in for by a probe
(head_reach.py), which sees what that layer sees; layers that keep states run as they are, in a page that is cleared afterwards.
Adapters do not.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import requires_raw_input_tokens
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec

from momentkv_vllm.attention.head_reach import Probe, random_tokens
from momentkv_vllm.attention.sample_text import text_tokens
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.head_budgets import HeadBudgets, grain_of, shared
from momentkv_vllm.kernels.own_budgets import budgets_in
from momentkv_vllm.key_rounding import feedback_of
from momentkv_vllm.kv_spec import schedules_of
from momentkv_vllm.page_schedule import PageSchedule

logger = logging.getLogger(f"vllm.{__name__}")

STEP_TOKENS = 128
"""Read at a time, or fewer where a step may have fewer: servers that differ in `--max-num-batched-tokens` find the same bits."""
FIRST_PAGE = 1
"""Nobody has a page yet. Layers of one KV cache group keep their state in this one meanwhile, those of the next in the one after:
layers of several groups lie in the same bytes."""


Seen = dict[str, list[Probe]]
"""By layer that evicts in a cache of its own, in the order in which they run: its probe, and those of layers that share it."""


def measure(runner: Any) -> None:
    """Tell the layers of `runner`, whose KV cache is there, what their heads hold and how their keys are rounded, if they
    measure it. Every rank and stage of a model must be asked: they run it together.

    runner: vLLM's V1 (vllm/v1/worker/gpu_model_runner.py) or V2 (gpu/model_runner.py), 0.32.0, on any device. It has captured no
    CUDA graph yet: graphs keep the addresses of what layers are told here, so it is told once.
    """
    config = EvictionConfig.from_vllm(runner.vllm_config)
    shares, rounds = config.head_budgets == "measured", config.key_rounding == "measured"
    text = text_of(runner) if rounds else None
    if shares or (rounds and text is None):
        seen = read(runner, tokens_for(runner))
    if shares:
        share_out(runner, {name: torch.stack([p.reach for p in probes]).amax(0) for name, probes in seen.items()})
    if rounds:
        feed_back(runner, seen if text is None else read(runner, text))


def read(runner: Any, ids: Tensor) -> Seen:
    """What layers do while the model reads `ids` [tokens]."""
    with probed(runner, len(ids)) as probes:
        hidden_states(runner, ids)
    layers = runner.compilation_config.static_forward_context
    evicting = {name for name, layer in _attending(runner).items() if layer.impl.evicts}
    if silent := sorted(evicting - set(probes)):  # those of a draft model
        logger.info("momentkv: layers %s... read nothing with the model: their heads are not measured", silent[:2])
    found: Seen = defaultdict(list)
    for name in (name for name in probes if name in evicting):
        found[layers[name].kv_sharing_target_layer_name or name].append(probes[name])
    return found


def text_of(runner: Any) -> Tensor | None:
    """[tokens] int64, those of queries; None: none but random ones can be had."""
    return text_tokens(cached_tokenizer_from_config(runner.model_config), runner.model_config.max_model_len)


def tokens_for(runner: Any) -> Tensor:
    """[tokens] int64, those of reach."""
    model = runner.model_config
    return random_tokens(model.get_vocab_size(), model.max_model_len)


@contextmanager
def probed(runner: Any, tokens: int) -> Iterator[dict[str, Probe]]:
    """Probes of a text of so many tokens stand in for all layers of `runner` that attend; yields those that did, by layer, the
    first one first."""
    attending = _attending(runner)
    targets = {layer.kv_sharing_target_layer_name for layer in attending.values()}
    probes: dict[str, Probe] = {}

    def forward_of(name: str, layer: Attention) -> Any:
        probe, target = _probe_of(layer, tokens), layer.kv_sharing_target_layer_name

        def forward(_layer, query, key, value, _cache, _metadata, output, *_args, **_kwargs) -> Tensor:
            """As an AttentionImpl's; nothing is cached."""
            probes.setdefault(name, probe)
            if target:
                return probe.read(query, probes[target].keys, probes[target].values, output)
            probe.attend(query, key, value, output)
            if probe.keys.shape[1] == tokens and name not in targets:
                probe.keys = probe.values = None  # of all layers they would be many
            return output

        return forward

    try:
        for name, layer in attending.items():
            layer.impl.forward = forward_of(name, layer)  # before the class's own
        yield probes
    finally:
        for layer in attending.values():
            del layer.impl.forward


@torch.inference_mode()
def hidden_states(runner: Any, ids: Tensor) -> list[Any]:
    """What the model makes of `ids`, step by step."""
    found, step, groups = [], min(STEP_TOKENS, runner.max_num_tokens), [g for of in runner.attn_groups for g in of]
    keeping = [group for group in groups if isinstance(group.kv_cache_spec, MambaSpec)]
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        metadata: dict[str, Any] = defaultdict(lambda: None)
        for group in keeping:
            page = FIRST_PAGE + group.kv_cache_group_id
            built = group.build_metadata(_one_sequence(start, start + len(part), page, runner.device))
            metadata |= dict.fromkeys(group.layer_names, built)
        with set_forward_context(metadata, runner.vllm_config, num_tokens=len(part)):
            found.append(_run(runner, part, start))
    layers = runner.compilation_config.static_forward_context
    for group in keeping:
        for state in (state for name in group.layer_names for state in layers[name].kv_cache):
            state[FIRST_PAGE + group.kv_cache_group_id].zero_()
    return found


def _run(runner: Any, ids: Tensor, start: int) -> Any:
    """One step of `runner`'s model, as its `execute_model` takes it; between pipeline stages as their workers do.

    A compiled model knows which inputs are None, their data types and strides, and looks at none of these again.
    """
    stages, model, inputs = get_pp_group(), runner.model_config, {}
    positions, ids = _positions(runner, start, start + len(ids)), ids.to(runner.device, torch.int32)
    if runner.lora_config:
        runner._set_active_loras((0,), (0,) * len(ids), set())  # 0: no adapter
    if (runner.supports_mm_inputs or model.enable_prompt_embeds) and stages.is_first_rank:
        inputs["inputs_embeds"] = runner.model.embed_input_ids(ids)
        ids = ids if requires_raw_input_tokens(runner.model) else None
    received = None
    if not stages.is_first_rank:
        received = IntermediateTensors(stages.recv_tensor_dict(all_gather_group=get_tp_group()))
    output = runner.model(
        input_ids=ids,
        positions=positions,
        intermediate_tensors=received,
        **{"inputs_embeds": None} | inputs,
    )
    if not stages.is_last_rank:
        stages.send_tensor_dict(output.tensors, all_gather_group=get_tp_group())
    return output


def _positions(runner: Any, start: int, end: int) -> Tensor:
    """[tokens] int64; of a model whose positions have several numbers [numbers, tokens], in the runner's own tensor, whose rows
    are longer than any step (vLLM's pull request 12128)."""
    at = torch.arange(start, end, device=runner.device)
    if not runner.model_config.uses_mrope:
        return at
    of_v2 = getattr(runner, "model_state", None)
    rows = of_v2.rope_state.positions if of_v2 else runner.mrope_positions.gpu
    return rows[:, : end - start].copy_(at)


def _one_sequence(start: int, end: int, page: int, device: torch.device) -> CommonAttentionMetadata:
    """Of a prompt whose tokens [start, end) are a step; its state lies in `page`, whatever column is asked for."""
    ends, lengths = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=ends.to(device),
        query_start_loc_cpu=ends,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=1,
        num_actual_tokens=end - start,
        max_query_len=end - start,
        max_seq_len=end,
        block_table_tensor=torch.full((1, end + 1), page, dtype=torch.int32, device=device),
        slot_mapping=torch.full((end - start,), -1, device=device),
        is_prefilling=torch.tensor([True]),
    )


def _probe_of(layer: Attention, tokens: int) -> Probe:
    impl, chunk = layer.impl, getattr(layer, "attention_chunk_size", None) or 0
    # Tokens that a query sees; on a GPU (those before it, those behind it), -1 for all.
    window = impl.sliding_window[0] + 1 if isinstance(impl.sliding_window, tuple) else impl.sliding_window
    return Probe(impl.scale, tokens, max(0, window), chunk, impl.logits_soft_cap, impl.sinks)


def _attending(runner: Any) -> dict[str, Attention]:
    layers = runner.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}


def feed_back(runner: Any, seen: Seen) -> None:
    """Give every layer its `feedback`, by what queries of its cache are."""
    for name, probes in seen.items():
        impl = _attending(runner)[name].impl
        moment = sum(p.queries for p in probes).cpu()
        impl.feedback = feedback_of(moment, impl.layout.packed.width).to(runner.device)


def share_out(runner: Any, reach: dict[str, Tensor]) -> None:
    """Give every layer its `heads`: what they hold of its cache, which stays where it is, in each budget class, by `reach`."""
    model, config = runner.model_config, EvictionConfig.from_vllm(runner.vllm_config)
    layers = [_attending(runner)[name] for name in reach]
    if not layers:
        return  # a pipeline stage without attention
    impls, caches = [x.impl for x in layers], [x.impl.view_of(x.kv_cache) for x in layers]
    page_size, longest = caches[0].page_size, model.max_model_len
    schedules = schedules_of(config, page_size, impls[0].head_size, impls[0].numbers, longest)
    watched = impls[0].policy.observes is not None
    observed = [impl.observing(c) if watched else None for impl, c in zip(impls, caches, strict=True)]
    far = torch.stack(list(reach.values())).cpu()

    def table(schedule: PageSchedule) -> list[HeadBudgets]:
        capacity = shared(far, schedule.store_tokens, grain_of(schedule.run_tokens), longest)
        return budgets_in(caches, observed, capacity, schedule.store_tokens, schedule.equal_tokens)

    unshared = [None] * len(impls)
    tables = [table(s) if served.evicts else unshared for served, s in zip(config.classes, schedules, strict=True)]
    for impl, heads in zip(impls, zip(*tables, strict=True), strict=True):
        impl.heads = heads
