"""The 13 tasks of RULER (Hsieh et al., arXiv 2404.06654), generated for any tokenizer, length and wording.

`sample(task, rng, wording, length, count_tokens)` makes a prompt that fills `length` tokens with its answer. What a task holds
follows RULER's published settings (number of needles, hops, frequencies); the sentences are ours, so scores are comparable
between methods here, not with the paper's table.

| task | the context holds | asked |
|---|---|---|
| niah_single_1/2/3 | one needle in repeated noise / text / text with a long value | its value |
| niah_multikey_1/2/3 | 4 needles in text / nothing but needles / nothing but long needles | the value of one |
| niah_multivalue | 4 needles of one key | all 4 values |
| niah_multiquery | 4 needles | the values of all 4 |
| vt | a chain of 5 variables assigned to each other | the variables that hold the value |
| cwe | a word list: 10 words 30 times, others 3 times | the 10 words |
| fwe | meaningless words by Zipf's law (alpha 2) | the 3 most frequent |
| qa_1, qa_2 | facts about people; qa_2 over a friend (two hops) | one fact |
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from evaluation.quality.wording import Wording

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """text: ends where the model continues; answer: as the test model is trained; references: what a right answer contains."""

    text: str
    answer: str
    references: tuple[str, ...]


@dataclass
class Facts:
    """Pieces to scatter over the context, in order, and the questions they answer."""

    pieces: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One prompt. `answer_tokens`: how much a model may say."""

    task: str
    prompt: str
    references: tuple[str, ...]
    answer: str
    answer_tokens: int


def needles(
    facts: Facts, rng: random.Random, w: Wording, count: int, queried: int = 1, values: int = 1,
    long_key: bool = False, long_value: bool = False,
) -> None:  # fmt: skip
    """`count` keys with `values` needles each; questions about `queried` of them at a time."""
    keys = w.keys(rng, count, long_key)
    held = {key: [w.value(rng, long_value) for _ in range(values)] for key in keys}
    pieces = [w.needle(key, value) for key, several in held.items() for value in several]
    if values == 1:
        rng.shuffle(pieces)
    facts.pieces += pieces
    asked = rng.sample(keys, len(keys) // queried * queried)
    for i in range(0, len(asked), queried):
        some = asked[i : i + queried]
        found = [v for key in some for v in held[key]]
        facts.questions.append(Question(w.ask_needles(some, values > 1), w.answer_needles(some, found), tuple(found)))


def variables(facts: Facts, rng: random.Random, w: Wording, hops: int = 4) -> None:
    names = w.variables(rng, hops + 1)
    value = w.value(rng)
    facts.pieces.append(w.assign(names[0], value, True))
    facts.pieces += [w.assign(b, a, False) for a, b in zip(names, names[1:], strict=False)]
    facts.questions.append(Question(w.ask_variables(value), w.answer_variables(names), tuple(names)))


def common_words(
    facts: Facts, rng: random.Random, w: Wording, room: int, common: int = 10, often: int = 30, seldom: int = 3
) -> None:
    """A list of `room` entries at most: `common` words so often, other words so seldom; both scaled down to the room."""
    often = max(seldom + 2, min(often, room * 2 // 3 // common))
    others = max(1, (room - common * often) // seldom)
    words = w.counted(rng, common + others, False)
    chosen, rest = words[:common], words[common:]
    if len(rest) < others:
        # The vocabulary has no more words: all of them stand more often, in the same ratio.
        seldom = max(seldom, room // (common * often // seldom + len(rest)))
        often = max(often, (room - seldom * len(rest)) // common)
    _count(facts, rng, w, chosen * often + rest * seldom, chosen, False)


def frequent_words(
    facts: Facts, rng: random.Random, w: Wording, room: int, vocabulary: int = 24, alpha: float = 2.0
) -> None:
    """Word i of the vocabulary stands about room / zeta(alpha) / i^alpha times."""
    words = w.counted(rng, vocabulary, True)
    weights = [(i + 1) ** -alpha for i in range(len(words))]
    share = room / sum(weights)
    _count(
        facts,
        rng,
        w,
        [x for x, p in zip(words, weights, strict=True) for _ in range(round(share * p))],
        words[:3],
        True,
    )


def _count(facts: Facts, rng: random.Random, w: Wording, listed: list[str], winners: list[str], coded: bool) -> None:
    rng.shuffle(listed)
    facts.pieces += [w.listed(word, i + 1) for i, word in enumerate(listed)]
    question = w.ask_counted(len(winners), coded)
    facts.questions.append(Question(question, " ".join(winners), tuple(winners)))


def people(facts: Facts, rng: random.Random, w: Wording, count: int, two_hops: bool) -> None:
    """Every person with two facts; with `two_hops` also a friend, and the question goes over the friend."""
    names = w.people(rng, count)
    order = names[1:] + names[:1]
    questions = []
    for name, friend in zip(names, order, strict=True):
        chosen = rng.sample(w.relations(), 2)
        for relation in chosen:
            value = w.attribute(rng)
            facts.pieces.append(w.fact(name, relation, value))
            if not two_hops:
                answer = w.answer_fact(None, relation, value)
                questions.append(Question(w.ask_fact(name, relation, False), answer, (value,)))
            elif relation == chosen[0]:
                asker = names[names.index(name) - 1]
                answer = w.answer_fact(name, relation, value)
                questions.append(Question(w.ask_fact(asker, relation, True), answer, (value,)))
        if two_hops:
            facts.pieces.append(w.friend(name, friend))
    rng.shuffle(facts.pieces)
    facts.questions += rng.sample(questions, min(len(questions), count))


@dataclass(frozen=True)
class Task:
    """fill: adds the facts for a room of so many tokens; haystack: what the rest is made of (text, noise or nothing).

    per_piece: rough tokens of one piece, for tasks whose facts fill the room ("nothing").
    """

    fill: Callable[[Facts, random.Random, Wording, int], None]
    haystack: str = "text"
    any_reference: bool = False


TASKS: dict[str, Task] = {
    "niah_single_1": Task(lambda f, r, w, n: needles(f, r, w, 1), "noise"),
    "niah_single_2": Task(lambda f, r, w, n: needles(f, r, w, 1)),
    "niah_single_3": Task(lambda f, r, w, n: needles(f, r, w, 1, long_value=True)),
    "niah_multikey_1": Task(lambda f, r, w, n: needles(f, r, w, 4)),
    "niah_multikey_2": Task(lambda f, r, w, n: needles(f, r, w, n), "nothing"),
    "niah_multikey_3": Task(lambda f, r, w, n: needles(f, r, w, n, long_key=True, long_value=True), "nothing"),
    "niah_multivalue": Task(lambda f, r, w, n: needles(f, r, w, 1, values=4)),
    "niah_multiquery": Task(lambda f, r, w, n: needles(f, r, w, 4, queried=4)),
    "vt": Task(lambda f, r, w, n: variables(f, r, w)),
    "cwe": Task(lambda f, r, w, n: common_words(f, r, w, n), "nothing"),
    "fwe": Task(lambda f, r, w, n: frequent_words(f, r, w, n), "nothing"),
    "qa_1": Task(lambda f, r, w, n: people(f, r, w, 12, False), any_reference=True),
    "qa_2": Task(lambda f, r, w, n: people(f, r, w, 12, True), any_reference=True),
}


def sample(task: str, rng: random.Random, wording: Wording, length: int, count_tokens: CountTokens) -> Sample:
    """A prompt of at most `length` tokens with its answer, and close to it.

    Args:
        count_tokens: tokens of a text in the model's tokenizer.

    Raises:
        KeyError: unknown task. ValueError: the facts alone do not fit `length`.
    """
    what = TASKS[task]
    state = rng.getstate()
    if what.haystack == "nothing":
        facts, fits = Facts(), 1
        # Grow the number of facts until they no longer fit: RULER's own way, by doubling and halving.
        step = 1
        while step:
            rng.setstate(state)
            trial = Facts()
            what.fill(trial, rng, wording, fits + step)
            if _tokens(" ".join(trial.pieces), trial, count_tokens) <= length and fits + step < length:
                facts, fits, step = trial, fits + step, step * 2
            else:
                step //= 2
        if not facts.pieces:
            raise ValueError(f"{task}: one fact does not fit {length} tokens")
        body = " ".join(facts.pieces)
    else:
        facts = Facts()
        what.fill(facts, rng, wording, 0)
        body = _fill_up(task, facts, rng, wording, what.haystack, length, count_tokens)
    question = rng.choice(facts.questions)
    answer_tokens = count_tokens(" " + question.answer)
    return Sample(task, f"{body} {question.text}", question.references, question.answer, answer_tokens)


def _tokens(body: str, facts: Facts, count_tokens: CountTokens) -> int:
    longest = max(facts.questions, key=lambda q: len(q.text) + len(q.answer))
    return count_tokens(f"{body} {longest.text} {longest.answer}")


def _fill_up(
    task: str, facts: Facts, rng: random.Random, w: Wording, haystack: str, length: int, count_tokens: CountTokens
) -> str:
    """The pieces scattered over as much haystack as fits."""
    units = [w.noise()] * length if haystack == "noise" else w.text(rng, length)
    places = sorted(rng.random() for _ in facts.pieces)
    low, high = 0, len(units)
    if _tokens(" ".join(facts.pieces), facts, count_tokens) > length:
        raise ValueError(f"{task}: the facts alone do not fit {length} tokens")
    while low < high:
        middle = (low + high + 1) // 2
        if _tokens(" ".join(scatter(facts.pieces, units[:middle], places)), facts, count_tokens) <= length:
            low = middle
        else:
            high = middle - 1
    return " ".join(scatter(facts.pieces, units[:low], places))


def scatter(pieces: list[str], units: list[str], places: list[float]) -> list[str]:
    """Insert the pieces, in order, at the given shares of the haystack."""
    out, last = [], 0
    for piece, share in zip(pieces, places, strict=True):
        at = round(share * len(units))
        out += [*units[last:at], piece]
        last = at
    return out + units[last:]


def score(task: str, said: str, references: tuple[str, ...]) -> float:
    """RULER's score: the share of references that occur in the answer; for QA, whether any does."""
    found = [reference.lower() in said.lower() for reference in references]
    return float(any(found)) if TASKS[task].any_reference else sum(found) / len(found)
