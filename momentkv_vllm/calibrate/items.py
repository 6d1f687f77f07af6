"""What a model is asked: token ids of a prompt and of the answer whose probability is measured.

Everything is teacher-forced: the model reads the prompt, then the right answer token by token. A code is found when each of its
digits is the likeliest token, which is what greedy decoding would say.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

GAP = "\x00"
"""Stands for tokens that are put in later."""
ADJECTIVES = tuple(
    "amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow olive patient quiet rusty silver "  # noqa: SIM905
    "tender upbeat vivid weary young zesty bright crimson distant early frozen golden humble".split()
)
NOUNS = tuple(
    "anchor basket candle dolphin engine falcon garden harbor island jacket kettle lantern meadow needle orchard pencil quarry "  # noqa: SIM905
    "ribbon saddle temple umbrella village window yacht zebra bridge cabin desert ember forest glacier helmet".split()
)


@dataclass(frozen=True)
class Item:
    """prompt, answer: token ids; counted: places of the answer whose probability counts (the digits of a code)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    counted: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def begin(self) -> list[int]:
        """What the tokenizer puts before every text: the token that begins a sequence, or nothing."""
        first = self.tokenizer("a").input_ids[0]
        return [first] if first == self.tokenizer.bos_token_id else []

    def chat(self, *turns: str) -> str:
        """The turns of user and assistant by the model's chat template, ready for the assistant's next one."""
        roles = ("user", "assistant")
        said = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if not self.tokenizer.chat_template:
            return "\n\n".join(turns) + "\n"
        return self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)

    def fill(self, frame: str, *fillings: list[int]) -> list[int]:
        """Tokens of `frame` with the fillings in the places of its gaps."""
        first, *rest = (self.ids(part) if part else [] for part in frame.split(GAP))
        return first + [t for filling, part in zip(fillings, rest, strict=True) for t in filling + part]


def key(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def code(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def sentence(name: str, said: str) -> str:
    """A needle: `said` is the code of `name`."""
    return f"Note well: the secret code of {name} is {said}."


def question(name: str) -> str:
    """Up to where the answer begins."""
    return f"\nWhat is the secret code of {name} in the text? The secret code of {name} is"


def text_item(ids: Sequence[int], judged: int) -> Item:
    """Running text, judged at its last tokens."""
    return Item(tuple(ids[:-judged]), tuple(ids[-judged:]), tuple(range(judged)))


def needle_item(reader: Reader, prompt: Sequence[int], answer: Sequence[int]) -> Item:
    digits = [i for i, token in enumerate(answer) if any(c.isdigit() for c in reader.tokenizer.decode([token]))]
    return Item(tuple(prompt), tuple(answer), tuple(digits))


def hidden_code(reader: Reader, rng: random.Random, ids: list[int], depth: float) -> Item:
    """A code put into a text at `depth` (0 to 1) of it, asked as a chat message that the assistant begins to answer.

    Prompt and answer have as many tokens as `ids`, whose end gives way.
    """
    name, said = key(rng), code(rng)
    asked, begun = question(name).split("? ")
    frame, answer = reader.chat(f"{GAP} {sentence(name, said)}\n{GAP}{asked}?") + begun, reader.ids(f" {said}")
    first = [] if reader.tokenizer.chat_template else reader.begin()
    room = len(ids) - len(answer) - len(first + reader.fill(frame, [], []))
    at = int(depth * room)
    return needle_item(reader, first + reader.fill(frame, ids[:at], ids[at:room]), answer)
