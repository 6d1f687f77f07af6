"""vLLM's schedulers with two more boundaries for a step's tokens, both known from the page schedule.

Chosen through vLLM's own option `scheduler_cls`, unless the user has set it.
"""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from momentkv_vllm.block_manager.spec import MomentKVSpec


class _StopsAtEvents:
    """Shortens what vLLM would schedule of a request, never to nothing.

    * A prefill chunk stops at the end of the cacheable prefix. The manager caches pages one step after they were filled, and the
      step that crosses the first event rewrites them: without the stop, a prompt whose first chunk is longer than the budget
      would leave nothing in the prefix cache.
    * Draft tokens stop before the tokens that the next event depends on: a page is retired for good, and what a policy has
      observed stays observed, so these steps have one token and no drafts.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        spec = _evicting_spec(self.kv_cache_config)
        self.page_schedule = spec.schedule
        self.own_tokens = spec.own_tokens
        self.cacheable_tokens = spec.cacheable_tokens

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on how many tokens of a request a step computes: [num_computed_tokens, + num_new_tokens)."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if num_computed_tokens < request.num_tokens - 1:  # it reads known tokens, without drafts
            ahead = self.cacheable_tokens - num_computed_tokens
            return min(tokens, ahead) if ahead > 0 else tokens
        if tokens <= 1:
            return tokens
        event = self.page_schedule.next_event(num_computed_tokens, request.num_prompt_tokens)
        return min(tokens, max(1, event - self.own_tokens - num_computed_tokens))


def _evicting_spec(kv_cache_config: KVCacheConfig) -> MomentKVSpec:
    """The spec of the one group of layers that evict. Models with sliding-window layers have other groups beside it; vLLM
    makes several of it if most layers evict, which the metrics' one set of books cannot tell apart."""
    specs = [g.kv_cache_spec for g in kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, MomentKVSpec)]
    if len(specs) != 1:
        raise ValueError(
            f"--kv-eviction: vLLM makes {len(specs)} KV cache groups of this model's full-attention layers, supported is 1 "
            f"(at most 1.5 times as many full-attention layers as sliding-window layers); serve without --kv-eviction"
        )
    return specs[0]


class MomentKVScheduler(_StopsAtEvents, Scheduler):
    """For --no-async-scheduling."""


class AsyncMomentKVScheduler(_StopsAtEvents, AsyncScheduler):
    """For --async-scheduling."""
