"""Requests whose answers are known: asked one at a time first, then again and again in mixed traffic."""

import json
import random
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from evaluation.quality.ruler import sample
from evaluation.quality.wording import Compact
from tqdm import tqdm

NEAR_TIE = 0.01
"""Nats between the two best tokens below which rounding decides: vLLM's CPU matrix products sum in another order for other batch
sizes (float32, about 1e-6), and what follows such a tie is another text. Counted, never hidden."""


@dataclass
class Request:
    """A greedy completion, and once it was asked alone: its tokens and the margin of each over the second best."""

    prompt: str
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def body(self, **more: Any) -> dict[str, Any]:
        """JSON of /v1/completions."""
        greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": "soak", "prompt": self.prompt, "max_tokens": self.max_tokens, **greedy, **more}

    def compare(self, tokens: list[int], complete: bool = True) -> str:
        """ "right", "near tie" (first difference where the margin is below NEAR_TIE) or "wrong". Aborted ones are a prefix."""
        for place, (got, want) in enumerate(zip(tokens, self.tokens)):  # noqa: B905
            if got != want:
                return "near tie" if self.margins[place] < NEAR_TIE else "wrong"
        return "right" if not complete or len(tokens) == len(self.tokens) else "wrong"


def catalog(count: int, seed: int = 0) -> list[Request]:
    """Short prompts that grow past the budget (they fill the pool while running: preemption), prompts of a few budgets, and every
    sixteenth longer than the whole pool."""
    rng, wording = random.Random(seed), Compact()
    requests = []
    for number in range(count):
        task = ("niah_multikey_1", "vt", "qa_1")[number % 3]
        if number % 16 == 15:
            context, new = 2000, 24
        elif number % 2:
            context, new = rng.randrange(300, 1000), rng.randrange(8, 48)
        else:
            context, new = rng.randrange(120, 200), rng.randrange(100, 260)
        requests.append(Request(sample(task, rng, wording, context, count_words).prompt, new))
    return requests


def count_words(text: str) -> int:
    """Tokens, too: in the test model one word is one token."""
    return len(text.split())


def ask_alone(url: str, request: Request) -> tuple[list[int], list[float]]:
    """Tokens and margins of one request while nothing else runs. Raises urllib.error.URLError."""
    body = json.dumps(request.body(logprobs=2)).encode()
    post = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=600) as response:
        choice = json.load(response)["choices"][0]
    best = [sorted(step.values(), reverse=True)[:2] for step in choice["logprobs"]["top_logprobs"]]
    return choice["token_ids"], [two[0] - two[1] if len(two) == 2 else 0.0 for two in best]


def record(url: str, requests: list[Request]) -> None:
    """The sequential run that all later answers are held against."""
    for request in tqdm(requests, desc="asked alone"):
        request.tokens, request.margins = ask_alone(url, request)


def replay(url: str, requests: list[Request]) -> dict[str, int]:
    """The same requests one at a time again, usually on a server that started since: verdicts counted."""
    verdicts = {"right": 0, "near tie": 0, "wrong": 0}
    for request in tqdm(requests, desc="asked alone"):
        verdicts[request.compare(ask_alone(url, request)[0])] += 1
    return verdicts
