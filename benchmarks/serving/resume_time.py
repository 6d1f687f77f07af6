"""What states do to the time: the first token of a conversation's turns, and the cost where no text ever comes again.

Part of serving.resume, whose `--only-time` measures it alone. Seconds are those of the CPU with one
thread, which other jobs on the machine change little; engines that are compared run in one process and take turns.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

import child
import report
from serving.resume import BUDGET, EVICTION, LONG, make_model, start, words

TURNS, CONVERSATIONS, ANSWER = 20, 5, 16
PAIRS, REQUESTS, PROMPT, NEW = 9, 4, 4 * BUDGET, 64
PAGES = 1024
ENGINES = {"stock": None, "momentkv": EVICTION}


def ask(engine, prompts: list[list[int]], new: int) -> tuple[float, float, list[int]]:
    """CPU seconds to the first token, to the end, and the last answer."""
    from serving.engine import add

    begin, first, answer = time.process_time(), 0.0, []
    for prompt in prompts:
        add(engine, str(random.random()), prompt, new)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.process_time() - begin
            answer = list(output.outputs[0].token_ids)
    return first, time.process_time() - begin, answer


def turns(model: str) -> dict[str, list[float]]:
    """Milliseconds to the first token of every turn of a conversation that grows to eight budgets, medians over conversations."""
    found = {}
    for name, eviction in ENGINES.items():
        engine, rng, seconds = start(model, eviction, PAGES), random.Random(0), []
        ask(engine, [words(rng, 2 * BUDGET)], 4)  # warm
        for _ in range(CONVERSATIONS):
            history, row = words(rng, 64), []
            for _ in range(TURNS):
                history += words(rng, (LONG - 64) // TURNS - ANSWER)
                first, _, answer = ask(engine, [history], ANSWER)
                history += answer
                row.append(1000 * first)
            seconds.append(row)
        found[name] = [round(statistics.median(column), 2) for column in zip(*seconds, strict=True)]
        engine.engine_core.shutdown()
    return found


def cost(model: str) -> dict[str, list[float]]:
    """Tokens per second with states over those without, prompt and answer together, by pair of runs over the same new texts."""
    engines = [start(model, settings, PAGES) for settings in (EVICTION, EVICTION | {"state_share": 0})]
    rng, rates, firsts = random.Random(2), [], []
    for pair in range(PAIRS + 1):
        texts, seconds = [words(rng, PROMPT) for _ in range(REQUESTS)], {}
        for number in (0, 1) if pair % 2 else (1, 0):
            seconds[number] = ask(engines[number], texts, NEW)
        if pair:  # the first one warms up
            rates.append(round(seconds[1][1] / seconds[0][1], 4))
            firsts.append(round(seconds[0][0] / seconds[1][0], 4))
    for engine in engines:
        engine.engine_core.shutdown()
    return {"throughput_on_to_off": rates, "first_token_on_to_off": firsts}


def measure() -> dict[str, dict]:
    """Both, in a child."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder), layers=4, hidden=512, heads=8, kv_heads=2, head_dim=64)
        return next(child.results("serving.resume_time", {"model": path}, OMP_NUM_THREADS="1"))


def targets(found: dict[str, dict]) -> list[dict]:
    """Of issue 20."""
    turn = found["turns"]["momentkv"]
    rate = statistics.median(found["cost"]["throughput_on_to_off"])
    return [
        report.target("conversations: first token of turn 20 / of turn 2", turn[-1] / turn[1], 1.2, False),
        report.target("nothing comes again: tokens/s with states / without", rate, 0.99),
    ]


if __name__ == "__main__":
    model = child.task()["model"]
    child.tell({"turns": turns(model), "cost": cost(model)})
