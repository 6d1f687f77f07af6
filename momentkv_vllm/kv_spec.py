"""The KV cache spec of layers that evict: what a sequence costs, and the page schedule both sides share."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, Self

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import FullAttentionSpec

from momentkv_vllm.config import AUTO, BudgetClass, EvictionConfig
from momentkv_vllm.fp8 import PAGE_TOKENS, kv_numbers
from momentkv_vllm.head_budgets import equal_until
from momentkv_vllm.kernels.limits import CacheShape
from momentkv_vllm.model_layers import full_layers, keeps_states
from momentkv_vllm.packed_store import TILE_TOKENS, PackedLayout
from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_layout import RecordLayout
from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule, build_schedule, cdiv
from momentkv_vllm.refuse import refuse


@dataclass(frozen=True)
class StateLayout:
    """How a sequence's pages are read.

    schedule: which pages hold what.
    record: the moment record; in the last store page, behind its tokens, where `schedule.record_tokens` says so.
    packed: how store pages are quantised; None: they are as any other.
    """

    schedule: PageSchedule
    record: RecordLayout
    packed: PackedLayout | None

    @classmethod
    def of(cls, config: EvictionConfig, page_size: int, head_dim: int, dtype: torch.dtype) -> Self:
        """Of a model's KV heads. Raises ValueError on too small a budget, and on a quantised store that holds no more."""
        config, record = settled(config, page_size, head_dim, dtype), record_layout(config, head_dim)
        keeps_only_sinks, item = config.policy_class.keeps_only_sinks, get_dtype_size(dtype)
        if not config.quantised_store:
            moment_pages = record.pages(page_size, item)
            return cls(build_schedule(config, page_size, moment_pages, keeps_only_sinks), record, None)
        packed, part = PackedLayout(config.quantised_store, head_dim), head_bytes(page_size, head_dim, dtype)
        page_tokens = packed.tokens_per_page(part)
        if page_tokens <= page_size:
            refuse(
                f"kv_eviction.store_dtype={config.store_dtype!r} would hold {page_tokens} tokens in a page of {page_size}: this "
                f"model's KV heads have {head_dim} numbers of {dtype}",
                "use 'model'",
                "use a larger --block-size",
            )
        start = (part - record.num_bytes) // RECORD_ALIGNMENT * RECORD_ALIGNMENT
        record_tokens, moment_pages = None, 0
        if start < 0:
            moment_pages = record.pages(page_size, item)
        else:
            record = replace(record, start=start)
            record_tokens = page_tokens - min(page_tokens, start // packed.tile_bytes * TILE_TOKENS)
        schedule = build_schedule(config, page_size, moment_pages, keeps_only_sinks, page_tokens, record_tokens)
        if config.head_budgets == "measured":
            schedule = replace(
                schedule, equal_tokens=equal_until(schedule.store_tokens, schedule.prefill_retire_tokens)
            )
        return cls(schedule, record, packed)

    def cache_shape(self, dtype: torch.dtype, softcap: float = 0.0) -> CacheShape:
        """What kernels must be able to serve, in layers that cap their logits there."""
        store = self.packed.dtype if self.packed else ""
        return CacheShape(
            self.record.head_dim, self.schedule.page_size, dtype, store, self.schedule.run_tokens, softcap
        )


RECORD_ALIGNMENT = 64
"""Bytes: where a record begins in a store page."""
AUTO_STORES, AUTO_RUN_TOKENS = {1: "int4", 2: "int4", 4: "int8"}, 8
"""By the bytes of a number of the cache: a quarter of a model's bits. Chosen on a real model (docs/quality.md); who computes in
float32 wants the same tokens in every batch, and a number that falls to the other side of a step of 4 bits can change them."""


def head_bytes(page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """What a KV head owns of a page."""
    return page_size * 2 * head_dim * get_dtype_size(dtype)


def settled(config: EvictionConfig, page_size: int, head_dim: int, dtype: torch.dtype) -> EvictionConfig:
    """`config` with what "auto" means for a model's KV heads, apart from its kernels, which may not have it (vllm_seams)."""
    store, run_tokens = config.store_dtype, config.run_tokens
    if store == AUTO:
        store, part = AUTO_STORES[get_dtype_size(dtype)], head_bytes(page_size, head_dim, dtype)
        # Where only sinks are kept, all else is window.
        if config.policy_class.keeps_only_sinks or PackedLayout(store, head_dim).tokens_per_page(part) <= page_size:
            store = "model"
    if run_tokens is None:
        run_tokens = 1 if store == "model" else AUTO_RUN_TOKENS
    return replace(config, store_dtype=store, run_tokens=run_tokens)


def record_layout(config: EvictionConfig, head_dim: int) -> RecordLayout:
    """The moment record that this configuration needs; empty when neither policy nor correction reads one."""
    reads = config.policy_class.reads
    covariance = config.correction == "first" or "covariance" in reads
    means = covariance or config.correction == "zeroth" or "means" in reads
    return RecordLayout(
        head_dim,
        config.moment_dtype,
        has_means=means,
        has_covariance=covariance,
        has_centres=config.quantised_store != "",
    )


def page_tokens(config: EvictionConfig, block_size: int, splits_blocks: bool, dtype: torch.dtype) -> int:
    """Tokens of a page: vLLM's block, or a part of it where a block is as large as the state of another layer."""
    least = PAGE_TOKENS if get_dtype_size(dtype) == 1 else 1
    return math.gcd(max(config.default_page_tokens, least), block_size) if splits_blocks else block_size


def schedules_of(
    config: EvictionConfig, page_size: int, head_dim: int, dtype: torch.dtype, most_tokens: int
) -> tuple[PageSchedule, ...]:
    """The page schedules of a configuration's classes for a model's KV heads and sequences of at most `most_tokens`. How a page
    is read does not depend on the class. Raises ValueError on too small a budget."""

    def of(served: BudgetClass) -> PageSchedule:
        schedule = StateLayout.of(served.config, page_size, head_dim, dtype).schedule
        return schedule if served.evicts else schedule.keeping_all(most_tokens)

    return tuple(map(of, config.classes))


def expected_layout(config: EvictionConfig, vllm_config: VllmConfig) -> StateLayout:
    """The layout that a model's layers will get, told before there are any. Raises ValueError on too small a budget."""
    return _expected(vllm_config, config, lambda *heads: StateLayout.of(config, *heads))


def expected_schedules(config: EvictionConfig, vllm_config: VllmConfig) -> tuple[PageSchedule, ...]:
    """Likewise the page schedules of all classes."""
    longest = vllm_config.model_config.max_model_len
    return _expected(vllm_config, config, lambda *heads: schedules_of(config, *heads, longest))


def shares_schedules(config: EvictionConfig, vllm_config: VllmConfig, head_size: int) -> bool:
    """Whether layers with heads of this size (a drafter's) hold the same columns of a block table as the model's, at any count.
    Raises ValueError on too small a budget for the model's."""
    longest = vllm_config.model_config.max_model_len

    def of(page_size: int, own: int, numbers: torch.dtype) -> bool:
        known = settled(config, page_size, own, numbers)
        schedules = schedules_of(known, page_size, own, numbers, longest)
        try:
            return schedules == schedules_of(known, page_size, head_size, numbers, longest)
        except ValueError:
            return False

    return _expected(vllm_config, config, of)


def _expected(vllm_config: VllmConfig, config: EvictionConfig, of: Callable[[int, int, torch.dtype], Any]) -> Any:
    """What `of` says of page size, head size and dtype."""
    model, block_size, layers = vllm_config.model_config, vllm_config.cache_config.block_size, full_layers(vllm_config)
    numbers = kv_numbers(vllm_config)
    page_size = page_tokens(config, int(block_size * layers.page_ratio), keeps_states(model), numbers)
    try:
        return of(page_size, layers.head_size, numbers)
    except ValueError as error:
        if page_size <= block_size:
            raise
        raise ValueError(
            f"{error} (--block-size {block_size} is meant for this model's sliding-window layers: vLLM gives all layers pages of "
            f"as many bytes, which are {page_size} tokens of a layer that evicts)"
        ) from None


@dataclass(frozen=True, kw_only=True)
class MomentKVSpec(FullAttentionSpec):
    """Full attention whose sequences never hold more than a budget.

    Attributes:
        schedules: which pages a sequence of each class holds, those of `page_tokens` always; the default class's first.
        config: the user's settings.
        step_tokens: most tokens of one request scheduled and not yet settled, those that a drafter writes beyond them included.
        model_name, engine: labels of the metrics.
        layers: how many layers evict, each counted once per tensor-parallel rank, by its bytes in those of this one: a drafter's
            may have other KV heads.
        splits_blocks: the model has layers that keep a state, and blocks as large as that, of several pages.
        most_tokens: of a sequence (--max-model-len).
    """

    schedules: tuple[PageSchedule, ...]
    config: EvictionConfig
    step_tokens: int
    model_name: str
    engine: int
    layers: float = 0
    splits_blocks: bool = False
    most_tokens: int = 0

    def __post_init__(self) -> None:
        """vLLM gives all layers of a model pages of as many bytes, by copies of the spec with more tokens per page
        (vllm/v1/core/kv_cache_utils.py, unify_kv_cache_spec_page_size: copy_with_new_block_size). These get a schedule of their
        own, the same on both sides, which take the spec from the KVCacheConfig. Raises ValueError on a budget too small for
        it, and on padded pages, whose heads do not lie side by side."""
        super().__post_init__()
        if self.page_size_padded not in (None, self.real_page_size_bytes):
            refuse(
                f"--kv-eviction cannot read padded pages: those of this model's full-attention layers have "
                f"{self.real_page_size_bytes} bytes, and vLLM pads them to {self.page_size_padded}, those of its other layers"
            )
        page_size = page_tokens(self.config, self.block_size, self.splits_blocks, self.dtype)
        if page_size != self.schedule.page_size:
            schedules = schedules_of(self.config, page_size, self.head_size, self.dtype, self.most_tokens)
            object.__setattr__(self, "schedules", schedules)

    @classmethod
    def of(cls, spec: FullAttentionSpec, config: EvictionConfig, vllm_config: VllmConfig, page_bytes: int) -> Self:
        """Bound a layer's spec; a page over all layers that evict, of a rank, has `page_bytes`. Raises ValueError on what
        eviction does not model."""
        if spec.head_size != spec.head_size_v:
            refuse(
                f"--kv-eviction needs key and value heads of one size, this model has {spec.head_size} and {spec.head_size_v}"
            )
        known = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        model, splits = vllm_config.model_config.served_model_name, keeps_states(vllm_config.model_config)
        page_size, parallel = page_tokens(config, spec.block_size, splits, spec.dtype), vllm_config.parallel_config
        longest = vllm_config.model_config.max_model_len
        return cls(
            **known,
            schedules=schedules_of(config, page_size, spec.head_size, spec.dtype, longest),
            config=config,
            step_tokens=vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens,
            model_name=model[0] if isinstance(model, list) else model,
            engine=parallel.data_parallel_index,
            layers=page_bytes / spec.page_size_bytes * parallel.tensor_parallel_size,
            splits_blocks=splits,
            most_tokens=longest,
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the layers of a group, which must be equal. vLLM tries layers of different kinds as well: an
        AssertionError tells it that these share no group."""
        assert all(isinstance(s, cls) for s in specs), "layers with and without eviction share no group"
        base = FullAttentionSpec.merge([FullAttentionSpec(**_base_fields(s)) for s in specs])
        if any(s.schedules != specs[0].schedules for s in specs):
            refuse("--kv-eviction needs the same KV head size in all layers")
        return replace(specs[0], **_base_fields(base))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What a sequence of max_model_len holds between steps, of the class that holds most: the figure behind vLLM's reported
        concurrency, and the least that it lets a pool have.

        While a prompt is read, tokens that wait for the next of its events (`reading_pages`) and the chunk being prefilled
        come on top; the manager checks at start-up that the pool has room for them.
        """
        blocks = cdiv(vllm_config.model_config.max_model_len, self.block_size)
        if not self.reads_any_prompt_whole:
            blocks = min(blocks, max(self.blocks_of(s).budget for s in self.schedules))
        return blocks * self.page_size_bytes

    @property
    def reads_any_prompt_whole(self) -> bool:
        """Whether a prompt of any length is attended exactly (prefill "full")."""
        return any(s.exact_prompt_tokens >= ANY_PROMPT for s in self.schedules)

    @property
    def schedule(self) -> PageSchedule:
        """Of the default class."""
        return self.schedules[0]

    @property
    def blocks(self) -> PageBlocks:
        """Likewise."""
        return self.blocks_of(self.schedule)

    def blocks_of(self, schedule: PageSchedule) -> PageBlocks:
        """vLLM's blocks of a schedule's pages."""
        return PageBlocks.of(schedule, self.block_size)

    @property
    def layout(self) -> StateLayout:
        return StateLayout.of(self.config, self.schedule.page_size, self.head_size, self.dtype)

    @property
    def cacheable_tokens(self) -> int:
        """Longest prefix that any request may take from the prefix cache."""
        return self.cacheable_before(min(s.first_event_tokens for s in self.schedules))

    def cacheable_before(self, first_event: int) -> int:
        """Longest prefix that a request may take from the prefix cache which evicts first at `first_event` tokens.

        That event must lie ahead, and so must the queries whose attention the policy wants before it. Beyond it a prefix is a
        store and a record, which no page holds as they were.
        """
        if self.config.policy_class.observes_every_query():
            return 0
        return max(0, first_event - self.unshared_tokens) // self.block_size * self.block_size

    @property
    def has_states(self) -> bool:
        """Whether what an eviction leaves behind may depend on the tokens before it alone. In "full" prefill it depends on where
        the prompt ended, and a policy may want every query since the first token. Where other layers keep states, vLLM has them
        at the ends of blocks, which evictions are not."""
        if self.splits_blocks:
            return False
        return not self.reads_any_prompt_whole and not self.config.policy_class.observes_every_query()

    def state_fingerprint(self, config: EvictionConfig) -> bytes:
        """Of all that shapes a state of the class with this `config` besides the tokens; an engine has one kernel family."""
        config = {key: value for key, value in config.to_dict().items() if not key.startswith("state_")}
        shape = [self.block_size, self.num_kv_heads, self.head_size, str(self.dtype)]
        return sha256(json.dumps([config, shape], sort_keys=True).encode()).digest()

    @property
    def unshared_tokens(self) -> int:
        """Last tokens before an event that a sequence must compute itself and without drafts: the policy observes them."""
        return self.config.observation_tokens if self.observes_attention else 1

    @property
    def observes_attention(self) -> bool:
        return self.config.policy_class.observes is not None

    @property
    def page_bytes(self) -> int:
        """Bytes of one of vLLM's blocks over all layers that evict, of all ranks of an engine."""
        return round(self.page_size_bytes * self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's moment pages in one layer, or of the records in its last store page."""
        if self.schedule.record_in_store:
            return self.layout.record.num_bytes * self.num_kv_heads
        return self.schedule.moment_pages * self.page_size_bytes // self.blocks.pages


def _base_fields(spec: FullAttentionSpec) -> dict:
    return {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
