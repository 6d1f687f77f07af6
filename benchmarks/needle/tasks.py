"""Long-context tasks as plain text over a closed vocabulary: one word is one token.

Every sample is a document of filler (topic Markov chains and rare words of this document) with facts scattered over it, and
one question at its end. `sample(task, rng, context_tokens)` makes one; `document(...)` is the trainer's denser version in
which everything is asked.

| task | the document holds | it ends with | answer |
|---|---|---|---|
| needle | one `remember k7 is v3 v9 .` | `? k7 is` | `v3 v9` |
| multikey | 12 needles with different keys | `? k7 is` | `v3 v9` |
| copy | `copy [ w1 .. w16 ]` | `? copy [` | `w1 .. w16` |
| vartrack | `let x1 = v3 .` then `let x2 = x1 .` ... | `? x3 is` | `v3` |
| common | 24 marked words `# c2`, one kind more often than others | `? most` | `c2` |
| text | filler only | the filler | (its continuation) |
"""

import random
from dataclasses import dataclass, field

KEYS = [f"k{i}" for i in range(40)]
VALUES = [f"v{i}" for i in range(40)]
TOPIC_WORDS = [f"t{i}" for i in range(96)]
RARE_WORDS = [f"r{i}" for i in range(24)]
COUNTED = [f"c{i}" for i in range(6)]
VARIABLES = [f"x{i}" for i in range(12)]
MARKS = ["remember", "is", ".", "?", "copy", "[", "]", "let", "=", "#", "most"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = SPECIAL + MARKS + KEYS + VALUES + TOPIC_WORDS + RARE_WORDS + COUNTED + VARIABLES
"""The whole vocabulary; a word's place is its token id."""

TASKS = ("needle", "multikey", "copy", "vartrack", "common", "text")
COPY_WORDS = 16
TOPICS = 8


@dataclass(frozen=True)
class Sample:
    """A prompt that ends exactly where the model must continue, and what it must say (words separated by spaces)."""

    task: str
    prompt: str
    answer: str


@dataclass
class Facts:
    """Pieces to scatter over a document, in order within each list, and the questions they answer."""

    pieces: list[list[str]] = field(default_factory=list)
    questions: list[tuple[list[str], list[str]]] = field(default_factory=list)


def _chain(topic: int) -> dict[str, str]:
    """A fixed successor for every topic word: the same for all documents of a topic."""
    order = TOPIC_WORDS[:]
    random.Random(1000 + topic).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


_CHAINS = [_chain(t) for t in range(TOPICS)]


def filler(rng: random.Random, count: int) -> list[str]:
    """`count` words: a topic's chain (70 %), jumps (10 %) and 20 % rare words that belong to this document."""
    chain = _CHAINS[rng.randrange(TOPICS)]
    rare = rng.sample(RARE_WORDS, 4)
    words, word = [], rng.choice(TOPIC_WORDS)
    for _ in range(count):
        draw = rng.random()
        if draw < 0.2:
            words.append(rng.choice(rare))
            continue
        word = chain[word] if draw < 0.9 else rng.choice(TOPIC_WORDS)
        words.append(word)
    return words


def add_needles(facts: Facts, rng: random.Random, count: int) -> None:
    for key in rng.sample(KEYS, count):
        value = rng.choices(VALUES, k=2)
        facts.pieces.append(["remember", key, "is", *value, "."])
        facts.questions.append((["?", key, "is"], value))


def add_copy(facts: Facts, rng: random.Random, count: int) -> None:
    words = rng.choices(VALUES + TOPIC_WORDS, k=count)
    facts.pieces.append(["copy", "[", *words, "]"])
    facts.questions.append((["?", "copy", "["], [*words, "]"]))


def add_variables(facts: Facts, rng: random.Random, hops: int) -> None:
    names = rng.sample(VARIABLES, hops + 1)
    value = rng.choice(VALUES)
    facts.pieces.append(["let", names[0], "=", value, "."])
    facts.pieces += [["let", b, "=", a, "."] for a, b in zip(names, names[1:], strict=False)]
    facts.questions.append((["?", names[-1], "is"], [value]))


def add_counts(facts: Facts, rng: random.Random, count: int) -> None:
    winner, *others = rng.sample(COUNTED, 4)
    marked = [winner] * (count * 2 // 5) + rng.choices(others, k=count - count * 2 // 5)
    rng.shuffle(marked)
    facts.pieces += [["#", word] for word in marked]
    best = max(sorted(set(marked)), key=marked.count)
    facts.questions.append((["?", "most"], [best]))


def _scatter(rng: random.Random, pieces: list[list[str]], words: list[str]) -> list[str]:
    """Insert pieces at random places of the filler, keeping the order of the pieces."""
    places = sorted(rng.randrange(len(words) + 1) for _ in pieces)
    out, last = [], 0
    for place, piece in zip(places, pieces, strict=True):
        out += words[last:place] + piece
        last = place
    return out + words[last:]


def _body(rng: random.Random, facts: Facts, room: int) -> list[str]:
    return _scatter(rng, facts.pieces, filler(rng, max(1, room - sum(map(len, facts.pieces)))))


def sample(task: str, rng: random.Random, context_tokens: int) -> Sample:
    """One sample whose prompt has about `context_tokens` words. Raises ValueError on an unknown task."""
    facts = Facts()
    if task == "needle":
        add_needles(facts, rng, 1)
    elif task == "multikey":
        add_needles(facts, rng, 12)
    elif task == "copy":
        add_copy(facts, rng, COPY_WORDS)
    elif task == "vartrack":
        add_variables(facts, rng, 2)
    elif task == "common":
        add_counts(facts, rng, 24)
    elif task == "text":
        return Sample(task, " ".join(filler(rng, context_tokens)), "")
    else:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
    question, answer = rng.choice(facts.questions)
    body = _body(rng, facts, context_tokens - len(question))
    answer = answer[:COPY_WORDS] if task == "copy" else answer
    return Sample(task, " ".join(body + question), " ".join(answer))


def document(rng: random.Random, tokens: int) -> tuple[list[str], list[bool]]:
    """A training document of exactly `tokens` words and, for each, whether it is part of an answer.

    Mixes the tasks as the room allows and asks (nearly) everything at the end, in random order.
    """
    facts = Facts()
    left = tokens - 12
    for kind in rng.sample(["needles", "copy", "counts", "variables"], 4):
        if kind == "needles" and left >= 11 and rng.random() < 0.85:
            # At least as many as fit half the room: with a single needle the answer needs no key.
            most = min(20, left // 11)
            add_needles(facts, rng, rng.randint((most + 1) // 2, most))
        elif kind == "copy" and left >= 22 and rng.random() < 0.6:
            add_copy(facts, rng, rng.randint(8, min(48, (left - 6) // 2)))
        elif kind == "counts" and left >= 60 and rng.random() < 0.25:
            add_counts(facts, rng, min(24, left // 6))
        elif kind == "variables" and left >= 20 and rng.random() < 0.25:
            add_variables(facts, rng, rng.randint(1, 2))
        asked = sum(len(q) + len(a) for q, a in facts.questions)
        left = tokens - 12 - asked - sum(map(len, facts.pieces))
    rng.shuffle(facts.questions)
    tail: list[str] = []
    answers: list[bool] = []
    for question, answer in facts.questions:
        tail += question + answer
        answers += [False] * len(question) + [True] * len(answer)
    body = _body(rng, facts, tokens - 2 - len(tail))
    words = ["<s>", *body, *tail, "</s>"]
    marks = [False] * (len(body) + 1) + answers + [bool(tail)]
    return words[:tokens], marks[:tokens]
