"""What the demo asks: questions over the documents of `data/`, and the late question of a chat."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """messages: a chat whose last turn is the question. right: an answer is right if it contains one of these, in any case."""

    messages: Messages
    right: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        return any(text.lower() in answer.lower() for text in self.right)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _load() -> dict:
    return tomllib.loads((DATA / "questions.toml").read_text())


def over_documents() -> list[Question]:
    """One turn each: a document and a question at its end."""
    questions = []
    for one in _load()["question"]:
        document = (DATA / f"{one['document']}.txt").read_text()
        turn = f"{document}\n{one['ask']} Answer in one sentence."
        questions.append(Question([user(turn)], tuple(one["right"])))
    return questions


def chat_turns() -> list[str]:
    """The user's side of the chat, as it is typed; the last turn asks about the first."""
    return [(DATA / "chat.txt").read_text(), *_load()["chat"]["turns"]]


def late(history: Messages) -> Question:
    """The chat's last turn after `history`."""
    return Question([*history, user(chat_turns()[-1])], tuple(_load()["chat"]["right"]))


def same_words(full: str, other: str) -> float:
    """Share of the words of two answers that are the same and in the same order, 0 to 1."""
    return difflib.SequenceMatcher(None, full.split(), other.split(), autojunk=False).ratio()
