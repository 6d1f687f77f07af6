"""What a kernel family is: four operations on a layer's cache, where they run, and what they can serve.

write -> attend -> observe -> consolidate, each batched over requests and heads. `rows` are requests of one work list; tensors
of page numbers index vLLM's block pool. reference.py is the specification that every other family is checked against.
"""

import time
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.in_torch import add_logits, candidates, read_store
from momentkv_vllm.kernels.limits import CacheShape, Limits
from momentkv_vllm.kernels.observed import Observed
from momentkv_vllm.kernels.worklists import AttendWork, LayersOf, RetireWork, Rounds, fresh_pages
from momentkv_vllm.policies.base import Policy
from momentkv_vllm.policies.key_direction import attention_weight


class KernelFamily(ABC):
    """One implementation of the operations, without state.

    A family implements `attend` and the operations with an underscore. What no kernel computes, statistics of logits and scores
    of other policies, is left to PyTorch here, for all families alike.

    Attributes:
        name: as the setting `kernels` takes it.
        devices: types of device that its tensors may lie on.
        limits: the caches that it can serve.
        native_scores: scores that `_consolidate` computes in place.
        feeds_back: `_consolidate` makes up for errors in keys (key_rounding.py) by a cache's `feedback`.
        own_budgets: serves heads with budgets of their own (head_budgets.py).
        by_name_only: "auto" never takes it.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    limits: Limits = Limits()
    native_scores: ClassVar[tuple[str, ...]] = ()
    feeds_back: ClassVar[bool] = False
    own_budgets: ClassVar[bool] = False
    by_name_only: ClassVar[bool] = False

    @abstractmethod
    def objections(self) -> list[str]:
        """Why this family cannot run on this machine; empty = it can."""

    def runs_on(self, device: str) -> bool:
        """Whether it can be named for tensors on a device of that type."""
        return device in self.devices

    def refusals(self, device: str, shape: CacheShape | None) -> list[str]:
        """Why it cannot serve tensors on `device` and, if it is known, a cache of that shape; empty = it can."""
        if not self.runs_on(device):
            return [f"it does not run on {device!r} tensors"]
        return self.objections() or (self.limits.objections(shape) if shape else [])

    def attends_prompts(self, shape: CacheShape) -> bool:
        """Whether it attends prompts faster than vLLM's own kernel of the layout that both read: those below the budget are its,
        too."""
        return False

    def label(self) -> str:
        """Its name for a log line, with the instruction set where it has one."""
        return self.name

    def write(self, cache: CacheView, key: Tensor, value: Tensor, slots: Tensor, observed: Observed | None) -> None:
        """Write new tokens; a page is zeroed when its first slot is written.

        A fresh page may have been a moment page: as keys and values its bytes can be NaN, and vLLM's kernel multiplies
        unwritten slots by zero.

        Args:
            key, value: [tokens, num_kv_heads, head_dim] of the cache's dtype, the model's where that is fp8.
            slots: [tokens] int64, page * page_size + slot; negative = padding, not written.
            observed: as in `observe`, zeroed on fresh pages; None unless the policy needs it.
        """
        if observed is not None and observed.mass is None:
            observed.data[fresh_pages(slots, cache.page_size)] = 0.0
        self._write(cache, key, value, slots, observed.mass if observed else None)

    @abstractmethod
    def attend(
        self, cache: CacheView, query: Tensor, output: Tensor, lse: Tensor | None, work: AttendWork, scale: float,
        corrected: bool,
    ) -> None:  # fmt: skip
        """Attention over the retained tokens and, if `corrected`, the moments as one more split of the same softmax.

        Writes the tokens of `work` into `output` and `lse`; other tokens are not touched.

        Args:
            cache: the layer's cache, this step's keys and values already written.
            query: [tokens, num_heads, head_dim], the step's flat token list.
            output: like `query`.
            lse: [tokens, num_heads] float32 logsumexp, moments included; None if not wanted.
            work: pages to read and causal limits.
            scale: softmax scale.
            corrected: add the evicted mass back.
        """

    def observe(
        self, cache: CacheView, observed: Observed, query: Tensor, lse: Tensor, work: AttendWork, scale: float
    ) -> None:
        """Add what the observed queries give to every retained token to `observed`, in place: attention mass, or logits.

        Args:
            query, lse: as given to and written by `attend`.
            work: `work.observe_from` [rows] says which queries count, `work.restart` which rows begin at zero.
        """
        if observed.mass is None:
            add_logits(cache, observed.data, query, work, scale)
        else:
            self._observe(cache, observed.mass, query, lse, work, scale)

    def attend_and_observe(
        self, cache: CacheView, observed: Observed, query: Tensor, output: Tensor, work: AttendWork, scale: float,
        corrected: bool,
    ) -> None:  # fmt: skip
        """`attend`, then `observe`; a family may do both in one pass."""
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self.attend(cache, query, output, lse, work, scale, corrected)
        self.observe(cache, observed, query, lse, work, scale)

    def consolidate(
        self, cache: CacheView, observed: Observed | None, work: RetireWork, policy: Policy, sink_tokens: int,
        scale: float,
    ) -> None:  # fmt: skip
        """Retire pages: their tokens compete with the store, losers join the moments, winners take the losers' slots.

        Per (row, head): exactly store_tokens candidates stay; sinks, the first slots of the store, always stay. Of equal scores
        the earlier candidate stays (store slots come before retiring tokens); a NaN score goes first.

        Args:
            observed: as filled by `observe`; mass moves along with the tokens. None unless the policy needs it.
            work: store, retiring and moment pages, and the number of tokens evicted before this event.
        """
        score = None
        if work.evicts and policy.native not in self.native_scores:
            score = policy.score(candidates(cache, observed, work, scale, self.read_store)).contiguous()
        mass = observed.mass if observed else None
        weight = attention_weight(policy, work.capacity(cache.page_size), work.run_tokens)
        self._consolidate(cache, mass, work, score, cache.sinks(sink_tokens), weight)

    def run(
        self, work: Rounds, observed: Observed | None, query: Tensor, output: Tensor, policy: Policy, sink_tokens: int,
        scale: float,
    ) -> list[float]:  # fmt: skip
        """Rounds, one after the other; a family may do them in one call.

        Args: as of `attend`, `observe` and `consolidate`.

        Returns:
            Seconds of each consolidation, as far as the call waits for it.
        """
        seconds = []
        for round_ in work.rounds:
            for attend in round_.attends:
                target = torch.empty_like(query) if attend.observe_only else output
                cache, given = work.attended(attend.budget_class), (attend, scale, work.corrected)
                if attend.observe_from is None:
                    self.attend(cache, query, target, None, *given)
                else:
                    self.attend_and_observe(cache, observed, query, target, *given)
            for retire in round_.retires:
                start = time.perf_counter()
                self.consolidate(work.caches(retire.budget_class), observed, retire, policy, sink_tokens, scale)
                seconds.append(time.perf_counter() - start)
        return seconds

    def consolidate_layers(
        self, layers: LayersOf, work: RetireWork, policy: Policy, sink_tokens: int, scale: float
    ) -> None:
        """`consolidate` in several layers; a family may do it in one launch."""
        for cache, observed in zip(layers.caches, layers.observed, strict=True):
            self.consolidate(cache, observed, work, policy, sink_tokens, scale)

    def read_store(self, cache: CacheView, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of quantised store pages [rows, n], float32 [rows, heads, slots, head_dim]."""
        return read_store(cache, pages)

    @abstractmethod
    def _write(self, cache: CacheView, key: Tensor, value: Tensor, slots: Tensor, mass: Tensor | None) -> None: ...

    @abstractmethod
    def _observe(
        self, cache: CacheView, mass: Tensor, query: Tensor, lse: Tensor, work: AttendWork, scale: float
    ) -> None: ...

    @abstractmethod
    def _consolidate(
        self, cache: CacheView, mass: Tensor | None, work: RetireWork, score: Tensor | None, sink_tokens: int,
        attention_weight: float,
    ) -> None:  # fmt: skip
        """score: [rows, heads, candidates] float32; None: the native one, whose second term `attention_weight` is for (0: it
        has none), or none because nothing is evicted."""
