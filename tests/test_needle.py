"""The trained model under a budget of a quarter of its context: what a wrong store, record or score would break at once."""

import random
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

NEEDLE = Path(__file__).parent.parent / "benchmarks/needle"
sys.path.insert(0, str(NEEDLE))

from tasks import TASKS, WORDS, document, sample  # noqa: E402

CHECKPOINT = NEEDLE / "checkpoint"


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_words_of_the_vocabulary(task):
    one = sample(task, random.Random(3), 700)
    assert abs(len(one.prompt.split()) - 700) <= 2
    assert set(one.prompt.split()) | set(one.answer.split()) <= set(WORDS)


@pytest.mark.parametrize("tokens", [64, 128, 1024])
def test_training_documents_fill_their_length_exactly(tokens):
    rng = random.Random(4)
    for _ in range(50):
        words, marks = document(rng, tokens)
        assert len(words) == len(marks) == tokens


def test_one_word_is_one_token_and_chat_equals_completion():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = sample("needle", random.Random(5), 100).prompt
    ids = tokenizer(prompt).input_ids
    assert len(ids) == len(prompt.split()) + 1 and tokenizer.decode(ids[1:]) == prompt
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(chat, add_special_tokens=False).input_ids == ids


@pytest.mark.engine
def test_needles_survive_a_quarter_of_the_cache(engine):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    rng = random.Random(6)
    samples = [sample("multikey", rng, 1000) for _ in range(24)]
    prompts = [tokenizer(s.prompt).input_ids for s in samples]
    right = {}
    kinds = {
        "momentkv": {},
        "first order, int8": {"correction": "first", "moment_dtype": "int8"},
        "streamingllm": {"policy": "streamingllm"},
    }
    for kind, options in kinds.items():
        e = engine(CHECKPOINT, **{"policy": "momentkv", "budget_tokens": 256, **options}, dtype="bfloat16")
        answers = [tokenizer.decode(t).split() for t in e.generate(prompts, 2)]
        right[kind] = sum(a == s.answer.split() for a, s in zip(answers, samples)) / len(samples)
        assert max(e.peak_pages.values()) <= 16 + 16
    # 24 prompts, +-0.07; measured 0.85 over 64.
    assert right["momentkv"] >= 0.7 and right["first order, int8"] >= 0.7 and right["streamingllm"] <= 0.5, right
