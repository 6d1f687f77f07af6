"""vLLM's schedulers with one more chunk boundary in prefill, so that a long prompt's prefix can be cached before it is rewritten.

Chosen through vLLM's own option `scheduler_cls` when prefix caching is on and the user has not set it.
"""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class _ChunkEndsAtCacheablePrefix:
    """A prefill chunk that would run across the end of the cacheable prefix stops there.

    The manager caches pages one step after they were filled; the step that crosses the first event rewrites them. Without the
    stop, a prompt whose first chunk is longer than the budget would leave nothing in the prefix cache.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        (group,) = self.kv_cache_config.kv_cache_groups
        self.cacheable_tokens = group.kv_cache_spec.cacheable_tokens

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on the length of a prefill chunk [num_computed_tokens, + num_new_tokens)."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        ahead = self.cacheable_tokens - num_computed_tokens
        in_prefill = num_computed_tokens < request.num_tokens - 1
        return min(tokens, ahead) if in_prefill and ahead > 0 else tokens


class PrefixScheduler(_ChunkEndsAtCacheablePrefix, Scheduler):
    """For --no-async-scheduling."""


class AsyncPrefixScheduler(_ChunkEndsAtCacheablePrefix, AsyncScheduler):
    """For --async-scheduling."""
