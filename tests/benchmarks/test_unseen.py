"""The texts of models that no default was chosen on: what is asked stands in the text, once, and answers are scored word by word."""

import random

import pytest
import torch
from evaluation.unseen import CONTEXT, PROMPT, SAMPLES, TASKS, questions, right
from test_model.model import Model, rope, rotate
from test_model.unseen import CONTEXTS, RECIPES, look_back

RECIPE = RECIPES[0]


@pytest.mark.parametrize("tokens", CONTEXTS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_training_text_is_as_long_as_asked_and_answers_itself(recipe, tokens):
    text = recipe.training_text(random.Random(tokens), tokens)
    assert len(text.tokens) == len(text.marks) == tokens
    assert set(text.tokens) <= set(recipe.vocabulary)
    asked = text.tokens.index("?")
    assert any(text.marks)
    for place in (n for n, word in enumerate(text.tokens) if word == "?"):
        key, value = text.tokens[place + 1 : place + 3]
        stands = [n for n in range(place) if text.tokens[n : n + 2] == ["=", key]]
        assert [text.tokens[n + 2] for n in stands] == [value]
        assert text.marks[place + 2] and not text.marks[place + 1]
    assert text.tokens[asked - 1] != "="


def test_every_question_has_one_answer_in_its_prompt():
    asked = questions(RECIPE)
    assert len(asked) == SAMPLES * len(TASKS)
    for question in asked:
        words, answer = question.prompt.split(), question.score.keywords["answer"]
        assert len(words) + len(answer) == PROMPT < CONTEXT
        lead = words[-2:] if question.task == "copy" else ["=", words[-1]]
        places = [n for n in range(len(words) - 2) if words[n : n + 2] == lead]
        assert [words[n + 2 : n + 2 + len(answer)] for n in places] == [answer]


def test_words_count_where_they_stand():
    assert right("a b c", ["a", "x", "c"]) == pytest.approx(2 / 3)
    assert right("b a", ["a", "b"]) == 0
    assert right("", ["a"]) == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_the_first_head_begins_by_looking_at_the_token_before(recipe):
    torch.manual_seed(0)
    model, head_dim = Model(len(recipe.vocabulary), recipe.shape), recipe.shape.head_dim
    look_back(model)
    layer = model.layers[0]
    x = layer.input_layernorm(model.embed_tokens(torch.randint(len(recipe.vocabulary), (64,))))
    turn = rope(64, head_dim, recipe.shape.rope_theta)
    query, key = (rotate(layer.self_attn[name](x)[:, :head_dim], *turn) for name in ("q_proj", "k_proj"))
    logits = (query @ key.T * head_dim**-0.5).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    before = logits.softmax(-1).diagonal(-1)
    assert before.mean() > 0.8
