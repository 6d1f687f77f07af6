"""What the real model is asked: token ids of a prompt and of the answer whose probability is measured.

Everything is teacher-forced: the model reads the prompt, then the right answer token by token. A needle is found when each of
its digits is the likeliest token, which is what greedy decoding would say. All prompts of a kind have the same length.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from evaluation.judge.documents import Document
from evaluation.quality import ruler
from evaluation.quality.wording import English
from transformers import PreTrainedTokenizerBase

from momentkv_vllm.calibrate.items import GAP, Item, Reader, needle_item, text_item

TEXT_TOKENS = 512
"""The end of a text that is judged."""
ANSWER_TOKENS = 64
TURNS = 6


@dataclass(frozen=True)
class Source(Reader):
    """Where items come from: documents and the model's tokenizer; `rng` is the only chance, `read` documents as tokens."""

    documents: Sequence[Document]
    rng: random.Random
    read: dict[str, list[int]] = field(default_factory=dict)

    def whole(self, document: Document) -> list[int]:
        if document.name not in self.read:
            self.read[document.name] = self.ids(document.text)
        return self.read[document.name]

    def stretch(self, tokens: int) -> list[int]:
        """Running text out of one document. Raises ValueError when all are shorter."""
        for document in self.rng.sample(self.documents, len(self.documents)):
            ids = self.whole(document)
            if len(ids) >= tokens:
                at = self.rng.randrange(len(ids) - tokens + 1)
                return ids[at : at + tokens]
        raise ValueError(f"none of {len(self.documents)} documents has {tokens} tokens; take a shorter kind")


def text(source: Source, context: int) -> Item:
    """The end of `context` tokens of running text."""
    return text_item(source.stretch(context), TEXT_TOKENS)


def needle(source: Source, context: int, task: str, answer_tokens: int) -> Item:
    """One of RULER's needle tasks in running text, asked as a chat message that the assistant begins to answer."""
    wording = English(source.tokenizer.decode(source.stretch(context)))
    room = context - answer_tokens - len(source.ids(source.chat("")))
    one = ruler.sample(task, source.rng, wording, room, lambda t: len(source.ids(t)))
    body, begin = one.prompt.rsplit("? ", 1)
    asked, answer = source.chat(f"{GAP}{body}?") + begin, source.ids(" " + ", ".join(one.references))
    missing = context - len(answer) - len(source.fill(asked, []))
    return needle_item(source, source.fill(asked, source.stretch(missing)), answer)


def chat(source: Source, context: int) -> Item:
    """A code in every turn of a long conversation; asked at its end is one of the first two."""
    wording = English()
    keys, codes = wording.keys(source.rng, TURNS), [wording.value(source.rng) for _ in range(TURNS)]
    while len(keys) < TURNS:
        keys = wording.keys(source.rng, TURNS)
    asked = source.rng.randrange(2)
    turns = [f"{GAP} {wording.needle(key, code)}\n{GAP}" for key, code in zip(keys, codes, strict=True)]
    said = [t for turn in turns for t in (turn, "Thank you, I have read this part.")]
    question, begin = wording.ask_needles([keys[asked]], False).strip().replace("the text", "my messages").split("? ")
    frame, answer = source.chat(*said, f"{question}?") + begin, source.ids(f" {codes[asked]}")
    room = context - len(answer) - len(source.fill(frame, *[[]] * (2 * TURNS)))
    share = [room // (2 * TURNS) + (i < room % (2 * TURNS)) for i in range(2 * TURNS)]
    return needle_item(source, source.fill(frame, *map(source.stretch, share)), answer)


def answer(source: Source, context: int) -> Item:
    """The beginning of a reference answer about a document, which loses its middle where it is too long."""
    while True:
        document = source.rng.choice(source.documents)
        question, reference = source.rng.choice(document.asks)
        frame = source.chat(f"{GAP}\n\n{question}")
        wanted, ids = source.ids(reference)[:ANSWER_TOKENS], source.whole(document)
        room = context - ANSWER_TOKENS - len(source.fill(frame, []))
        # Letters of a multiple choice say little, and an exam paper is no question.
        if len(wanted) >= 8 and context // 2 <= room <= len(ids):
            cut = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
            return Item(tuple(source.fill(frame, cut)), tuple(wanted), tuple(range(len(wanted))))


@dataclass(frozen=True)
class Kind:
    make: Callable[[Source, int], Item]
    context: int
    count: int


def _needles(context: int, count: int) -> dict[str, Kind]:
    tasks = {"single": ("niah_single_2", 8), "multikey": ("niah_multikey_1", 8), "multivalue": ("niah_multivalue", 40)}
    return {
        f"{name}_{context // 1024}k": Kind(partial(needle, task=task, answer_tokens=tokens), context, count)
        for name, (task, tokens) in tasks.items()
    }


KINDS: dict[str, Kind] = {
    "text_2k": Kind(text, 2048, 8),
    **_needles(1024, 8),
    "answers_2k": Kind(answer, 2048, 8),
    "chat_2k": Kind(chat, 2048, 8),
    "text_4k": Kind(text, 4096, 4),
    "text_8k": Kind(text, 8192, 4),
    **_needles(2048, 8),
    **_needles(4096, 4),
}
SMALL = ("text_2k", "single_1k", "multikey_1k", "multivalue_1k", "answers_2k")
"""A cell that is quick enough to search with."""


class Material:
    """Items by kind, always the same for the same documents, half and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], half: str) -> None:
        self.tokenizer, self.documents, self.half = tokenizer, documents, half
        self.read: dict[str, list[int]] = {}

    def items(self, kind: str, most: int = 0) -> list[Item]:
        """The first `most` items (0: as many as the kind has). Raises ValueError when no document is long enough."""
        what, chance = KINDS[kind], random.Random(f"{kind} {self.half}")
        source = Source(self.tokenizer, self.documents, chance, self.read)
        return [what.make(source, what.context) for _ in range(min(most, what.count) or what.count)]
