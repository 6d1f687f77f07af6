"""RULER's tasks: they fill the length they are given, hold what they ask for, and score as RULER does."""

import random

import pytest
from evaluation.quality.ruler import TASKS, sample, score
from evaluation.quality.wording import Compact, English
from test_model.documents import WORDS, document

WORDINGS = {"compact": (Compact(), lambda text: len(text.split())), "english": (English(), lambda text: len(text) // 4)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("length", [700, 2000])
def test_prompts_fill_their_length_and_hold_their_answers(task, wording, length):
    words, count = WORDINGS[wording]
    one = sample(task, random.Random(3), words, length, count)
    # A task may run out of different names (compact wording) before the context is full.
    least = 0.5 if wording == "compact" else 0.93
    assert least * length <= count(f"{one.prompt} {one.answer}") <= length
    for reference in one.references:
        assert reference in one.prompt
    assert score(task, f"It is: {one.answer}.", one.references) == 1.0
    assert score(task, "no idea", one.references) == 0.0
    if wording == "compact":
        assert set(f"{one.prompt} {one.answer}".split()) <= set(WORDS)


def test_a_sample_is_a_function_of_its_seed():
    words, count = WORDINGS["english"]
    one, same = (sample("niah_multikey_1", random.Random(5), words, 900, count) for _ in range(2))
    assert one == same != sample("niah_multikey_1", random.Random(6), words, 900, count)


@pytest.mark.parametrize("task", ["niah_multiquery", "vt", "cwe"])
def test_a_part_of_the_references_is_a_part_of_the_score(task):
    words, count = WORDINGS["english"]
    one = sample(task, random.Random(7), words, 2000, count)
    half = one.references[: len(one.references) // 2]
    assert score(task, ", ".join(half).upper(), one.references) == pytest.approx(len(half) / len(one.references))


def test_the_right_answer_can_be_computed_from_the_prompt():
    words, count = WORDINGS["english"]
    counted = sample("fwe", random.Random(8), words, 3000, count)
    listed = [w for w in counted.prompt.split("\n")[0].split() if not w[0].isdigit()]
    best = sorted(set(listed), key=listed.count, reverse=True)[:3]
    assert sorted(best) == sorted(counted.references)
    chain = sample("vt", random.Random(8), words, 3000, count)
    holds = set()
    for sentence in chain.prompt.split(". "):
        if sentence.startswith("Set "):
            variable, source = sentence.removeprefix("Set ").split(" to ")
            assert source[0].isdigit() or source.removeprefix("the value of ") in holds, "in order"
            holds.add(variable)
    assert holds == set(chain.references)


def test_too_short_a_context_is_an_error():
    words, count = WORDINGS["english"]
    with pytest.raises(ValueError, match="niah_multiquery: the facts alone do not fit 40 tokens"):
        sample("niah_multiquery", random.Random(1), words, 40, count)


@pytest.mark.parametrize("tokens", [64, 128, 1024, 2048])
def test_training_documents_fill_their_length_exactly(tokens):
    rng = random.Random(4)
    for _ in range(30):
        words, marks = document(rng, tokens)
        assert len(words) == len(marks) == tokens and set(words) <= set(WORDS)
        assert words[0] == "<s>" and words[-1] == "</s>", "nothing was cut off"
