"""One run with draft tokens beside one without.

Once numba (vLLM's n-gram drafter) is loaded, vLLM 0.32.0's scan of all modules for kernels (vllm/triton_utils/dispatcher.py,
_rebind_kernels) trips over an object of llvmlite: engine.py lets the first engine of a process do it, and no other.
"""

from pathlib import Path
from typing import Any

from engine import Engine, random_prompt

from momentkv_vllm.budget_classes import class_number
from momentkv_vllm.metrics import EVICTED_TOKENS, RETIRED_PAGES

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def watch_drafts(e: Engine) -> list[tuple[int, int]]:
    """(first position, tokens) of every decode step with drafts, as they are scheduled."""
    seen: list[tuple[int, int]] = []
    schedule = e.scheduler.schedule

    def watched(*args, **kwargs):
        before = {name: r.num_computed_tokens for name, r in e.scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        seen.extend((before[n], output.num_scheduled_tokens[n]) for n in output.scheduled_spec_decode_tokens)
        return output

    e.scheduler.schedule = watched
    return seen


def run(
    model: Path, prompts: list[int], new_tokens: int, options: dict, sampling: dict | None = None, **more: Any
) -> dict[str, Any]:
    """Of prompts of these lengths: tokens that are wanted and got, where drafts were, what was preempted, cached and retired.

    more: options of the engine with drafts alone.
    """
    prompts, sampling = [random_prompt(n, seed=5) for n in prompts], sampling or {}
    plain = Engine(model, **options)
    want = plain.generate(prompts, new_tokens, **sampling)
    e = Engine(model, **options, **more, speculative_config=NGRAM)
    steps = watch_drafts(e)
    got = e.generate(prompts, new_tokens, **sampling)
    number = class_number(e.manager.kv_cache_spec.config.class_names, sampling.get("extra_args"))
    events = [list(e.manager.books[number].schedule.events(first, first + tokens)) for first, tokens in steps]
    retired = [[x.manager.metrics.values[m, 0] for m in (RETIRED_PAGES, EVICTED_TOKENS)] for x in (plain, e)]
    for each in (e, plain):
        each.close()
    return {
        "want": want, "got": got, "steps": steps, "events": events, "preemptions": e.preemptions, "cached": e.cached_tokens,
        "retired": retired,
    }  # fmt: skip
