"""One run with draft tokens beside one without, in a process of its own; prints JSON.

A process of its own, because no other vLLM engine can start in a process once numba (vLLM's n-gram drafter) is loaded: vLLM 0.32.0's
scan of all modules (vllm/triton_utils/dispatcher.py, _rebind_kernels) trips over an object of llvmlite.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from engine import Engine, random_prompt  # noqa: E402  after the environment is set

from momentkv_vllm.budget_classes import class_number  # noqa: E402
from momentkv_vllm.metrics import EVICTED_TOKENS, RETIRED_PAGES  # noqa: E402

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


def main(task: dict) -> None:
    prompts = [random_prompt(n, seed=5) for n in task["prompts"]]
    sampling = task["sampling"]
    plain = Engine(task["model"], **task["options"])
    want = plain.generate(prompts, task["new_tokens"], **sampling)
    e = Engine(task["model"], **task["options"], **task["more"], speculative_config=NGRAM)
    steps = watch_drafts(e)
    got = e.generate(prompts, task["new_tokens"], **sampling)
    number = class_number(e.manager.kv_cache_spec.config.class_names, sampling.get("extra_args"))
    events = [list(e.manager.books[number].schedule.events(first, first + tokens)) for first, tokens in steps]
    result = {
        "want": want, "got": got, "steps": steps, "events": events, "preemptions": e.preemptions, "cached": e.cached_tokens,
        "peaks": [plain.peak_pages, e.peak_pages], "retired": [[x.manager.metrics.values[m, 0] for m in (RETIRED_PAGES, EVICTED_TOKENS)] for x in (plain, e)],
    }  # fmt: skip
    for each in (e, plain):
        each.close()
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
