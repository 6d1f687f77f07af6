"""Hypothesis strategies: what clients ask of the completion endpoints, right and wrong, and how they leave."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from engine import random_prompt
from hypothesis import strategies as st

BUDGET = 256
MODEL_LENGTH = 1024
HIDDEN_SIZE = 64

_WRONG_NUMBER = st.sampled_from([-1, 0, 1.5, 10**9, -(10**9), 1e308, "3", None, [], True])


def _embeds(rows: int) -> str:
    buffer = io.BytesIO()
    torch.save(torch.randn(rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(rows)), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


lengths = st.one_of(st.integers(1, 60), st.integers(BUDGET - 20, BUDGET + 20), st.integers(BUDGET, MODEL_LENGTH - 60))
"""Prompts around the budget, where the schedule has its edges, as often as short and long ones."""

token_prompts = st.builds(
    lambda length, begin, end: (random_prompt(MODEL_LENGTH, begin)[: length // 2] + random_prompt(length, end))[:length],
    lengths, st.integers(0, 2), st.integers(0, 9),
)  # fmt: skip
"""Token ids that share one of three beginnings, so that prefixes are found in the cache."""

texts = st.builds(lambda ids: " ".join(f"w{t - 4}" for t in ids if t >= 4), token_prompts)

FIELDS: dict[str, tuple[st.SearchStrategy, st.SearchStrategy]] = {
    "max_tokens": (st.integers(1, 40), _WRONG_NUMBER),
    "min_tokens": (st.integers(0, 10), _WRONG_NUMBER),
    "temperature": (st.sampled_from([0.0, 0.3, 1.0, 2.0]), _WRONG_NUMBER),
    "seed": (st.integers(0, 2**63 - 1), st.sampled_from([-(2**63), -1, 2**63, 2**64, 1.5, "7"])),
    "top_p": (st.floats(0.05, 1.0), _WRONG_NUMBER),
    "top_k": (st.sampled_from([-1, 0, 1, 5, 10**6]), _WRONG_NUMBER),
    "min_p": (st.floats(0.0, 1.0), _WRONG_NUMBER),
    "n": (st.integers(1, 3), _WRONG_NUMBER),
    "logprobs": (st.integers(0, 5), _WRONG_NUMBER),
    "prompt_logprobs": (st.integers(0, 3), _WRONG_NUMBER),
    "echo": (st.booleans(), st.just("yes")),
    "stop": (st.sampled_from(["w7", ["w7", "w11 w3"], []]), st.sampled_from([5, [""], [None], "x" * 10**4])),
    "stop_token_ids": (st.lists(st.integers(0, 127), max_size=3), st.sampled_from([[10**9], [-1], "7"])),
    "bad_words": (st.sampled_from([["w7"], ["w7 w8", "w9"]]), st.sampled_from([[""], ["unknown"], "w7"])),
    "logit_bias": (
        st.sampled_from([{"7": 5.0}, {"7": -100, "9": 100}]),
        st.sampled_from([{"999999": 1}, {"x": 1}, []]),
    ),
    "allowed_token_ids": (st.sampled_from([[5, 6, 7], list(range(128))]), st.sampled_from([[], [-1], [10**6]])),
    "ignore_eos": (st.booleans(), st.just("maybe")),
    "presence_penalty": (st.floats(-2.0, 2.0), _WRONG_NUMBER),
    "frequency_penalty": (st.floats(-2.0, 2.0), _WRONG_NUMBER),
    "repetition_penalty": (st.floats(0.1, 2.0), _WRONG_NUMBER),
    "structured_outputs": (
        st.sampled_from([{"choice": ["w7", "w11"]}, {"regex": "w[0-9] w[0-9]"}, {"grammar": 'root ::= "w7" | "w8"'}]),
        st.sampled_from([{"regex": "("}, {"choice": []}, {"json": "{"}, {"grammar": "root ::="}, {}, "w7"]),
    ),
    "priority": (st.integers(-5, 5), _WRONG_NUMBER),
    "cache_salt": (st.sampled_from(["a", "b"]), st.sampled_from(["", 5])),
    "truncate_prompt_tokens": (st.sampled_from([-1, 1, 40, 255, 257, 600]), _WRONG_NUMBER),
    "use_beam_search": (st.booleans(), st.just("wide")),
    "return_token_ids": (st.booleans(), st.just(7)),
    "include_stop_str_in_output": (st.booleans(), st.just([])),
    "prompt_embeds": (st.sampled_from([1, 40, 300]).map(_embeds), st.sampled_from(["", "AAAA", [""]])),
    "model": (st.just("adapter"), st.sampled_from(["", "other", None, 5])),
}
"""Field of a completion request: right values, wrong values."""


@dataclass(frozen=True)
class Ask:
    """A request, and when its client is gone.

    Attributes:
        path, body: as posted.
        wait: seconds before it is sent.
        leave: seconds after which the client closes the connection; None: it reads to the end.
    """

    path: str
    body: dict[str, Any]
    wait: float = 0.0
    leave: float | None = None


@st.composite
def asks(draw: st.DrawFn, fields: tuple[str, ...]) -> Ask:
    """A request with up to five of `fields` beside its prompt, one of eight of them wrong."""
    chat = draw(st.booleans()) and draw(st.booleans())
    body: dict[str, Any] = {"model": "tiny", "max_tokens": draw(st.integers(1, 40)), "stream": draw(st.booleans())}
    if chat:
        body["messages"] = [{"role": "user", "content": draw(texts)}]
    else:
        body["prompt"] = draw(st.one_of(token_prompts, token_prompts, texts, st.lists(token_prompts, max_size=3)))
    for name in draw(st.lists(st.sampled_from(fields), max_size=5, unique=True)):
        right, wrong = FIELDS[name]
        body[name] = draw(wrong if draw(st.integers(0, 7)) == 0 else right)
    leave = draw(st.none() | st.floats(0.0, 0.4)) if draw(st.booleans()) else None
    return Ask(f"/v1/{'chat/' if chat else ''}completions", body, draw(st.floats(0.0, 0.2)), leave)


def bursts(without: frozenset[str] = frozenset()) -> st.SearchStrategy[list[Ask]]:
    """Requests of clients that come at about the same time, none with a field of `without`."""
    return st.lists(asks(tuple(sorted(FIELDS.keys() - without))), min_size=1, max_size=12)
