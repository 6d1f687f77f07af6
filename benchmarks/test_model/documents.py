"""Training documents of the test model: several tasks of quality/ruler.py in one context, everything asked at its end."""

import random

from evaluation.quality.ruler import Facts, Question, common_words, frequent_words, needles, people, scatter, variables
from evaluation.quality.wording import Compact

WORDING = Compact()
WORDS = WORDING.WORDS


def _copy(facts: Facts, rng: random.Random, room: int) -> None:
    piece, question, answer = WORDING.copy_task(rng, rng.randint(8, max(8, min(40, room // 2))))
    facts.pieces.append(piece)
    facts.questions.append(Question(question, f"{answer} ]", (answer,)))


def _needles(facts: Facts, rng: random.Random, room: int) -> None:
    # At least as many as fit half the room: with a single needle the answer needs no key.
    most = min(16, room // 7)
    needles(facts, rng, WORDING, rng.randint(max(1, most // 2), max(1, most)))


def _long_needles(facts: Facts, rng: random.Random, room: int) -> None:
    needles(
        facts, rng, WORDING, rng.randint(1, max(1, min(6, room // 22))), long_key=rng.random() < 0.5, long_value=True
    )


def _multivalue(facts: Facts, rng: random.Random, room: int) -> None:
    needles(facts, rng, WORDING, min(2, room // 50), values=4)


def _multiquery(facts: Facts, rng: random.Random, room: int) -> None:
    needles(facts, rng, WORDING, 4 * rng.randint(1, max(1, min(2, room // 100))), queried=4)


def _common(facts: Facts, rng: random.Random, room: int) -> None:
    common_words(facts, rng, WORDING, room // 4, common=rng.choice((4, 10)) if room >= 400 else 4)


def _frequent(facts: Facts, rng: random.Random, room: int) -> None:
    frequent_words(facts, rng, WORDING, room // 4)


def _people(facts: Facts, rng: random.Random, room: int) -> None:
    extra = Facts()
    people(extra, rng, WORDING, max(2, min(12, room // 20)), rng.random() < 0.5)
    facts.pieces += extra.pieces
    facts.questions += extra.questions


KINDS = (
    (_needles, 0.7, 24), (_copy, 0.5, 24), (_long_needles, 0.3, 60), (_multivalue, 0.25, 60), (_multiquery, 0.3, 60),
    (_common, 0.15, 60), (_frequent, 0.15, 60), (_people, 0.3, 48),
    (lambda f, r, n: variables(f, r, WORDING, min(4, n // 16)), 0.3, 40),
)  # fmt: skip
"""(adds facts for a room of tokens, probability, least room)."""

SHORT = 128


def document(rng: random.Random, tokens: int) -> tuple[list[str], list[bool]]:
    """A document of exactly `tokens` words and, for each, whether it is part of an answer."""
    facts = Facts()
    left = tokens - 12
    dense = rng.random() < 0.15
    for add, probability, least in rng.sample(KINDS, len(KINDS)):
        # Short documents only copy and look up: that is where the induction heads come from.
        if tokens <= SHORT and add not in (_needles, _copy):
            continue
        if left >= least and rng.random() < max(probability, tokens <= SHORT):
            trial = Facts()
            add(trial, rng, left if dense else left // 2)
            size = sum(p.count(" ") + 1 for p in trial.pieces)
            size += sum(f"{q.text} {q.answer}".count(" ") + 1 for q in trial.questions)
            if size <= left:
                facts.pieces += [*trial.pieces]
                facts.questions += trial.questions
                left -= size
    if dense and left >= 200:
        # The haystack of multikey_2 and _3: nothing but needles, a few of them asked.
        trial = Facts()
        needles(trial, rng, WORDING, left // 7, long_key=rng.random() < 0.3)
        facts.pieces += trial.pieces
        facts.questions += trial.questions[: left // 50]
    # Pieces of one task must keep their order (chains, values): interleave the tasks' lists by sorted random places.
    rng.shuffle(facts.questions)
    tail: list[str] = []
    answers: list[bool] = []
    for question in facts.questions:
        text, answer = question.text.split(), question.answer.split()
        tail += text + answer
        answers += [False] * len(text) + [True] * len(answer)
    used = sum(p.count(" ") + 1 for p in facts.pieces)
    room = tokens - 2 - len(tail)
    places = sorted(rng.random() for _ in facts.pieces)
    filler = WORDING.text(rng, max(0, room - used))
    body = " ".join(scatter(facts.pieces, filler, places)).split()
    words = ["<s>", *body, *tail, "</s>"]
    marks = [False] * (len(body) + 1) + answers + [bool(tail)]
    return words[-tokens:], marks[-tokens:]
