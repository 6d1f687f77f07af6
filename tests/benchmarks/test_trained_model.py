"""The trained model under a budget of a quarter of its context: what a wrong store, record or score would break at once."""

from pathlib import Path

import pytest
from evaluation.quality.questions import ruler_questions
from evaluation.quality.wording import Compact
from transformers import AutoTokenizer

CHECKPOINT = Path(__file__).parents[2] / "benchmarks/test_model/checkpoint"


def test_one_word_is_one_token_and_chat_equals_completion():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = ruler_questions(["niah_single_2"], Compact(), tokenizer, 100, 1, [5], chat=False)[0].prompt
    ids = tokenizer(prompt).input_ids
    assert len(ids) == len(prompt.split()) + 1 and tokenizer.decode(ids[1:]) == prompt
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(chat, add_special_tokens=False).input_ids == ids


@pytest.mark.engine
def test_needles_survive_a_quarter_of_the_cache(engine):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    questions = ruler_questions(["niah_multikey_1", "vt"], Compact(), tokenizer, 1024, 12, [6], chat=False)
    prompts = [tokenizer(q.prompt).input_ids for q in questions]
    right = {}
    kinds = {
        "momentkv": {},
        "first order, int8": {"correction": "first", "moment_dtype": "int8"},
        "streamingllm": {"policy": "streamingllm"},
    }
    for kind, options in kinds.items():
        e = engine(CHECKPOINT, **{"policy": "momentkv", "budget_tokens": 256, **options}, dtype="bfloat16")
        answers = [tokenizer.decode(tokens) for tokens in e.generate(prompts, max(q.answer_tokens for q in questions))]
        right[kind] = sum(q.score(a) for a, q in zip(answers, questions)) / len(questions)
        assert max(e.peak_pages.values()) <= 16 + 16
    # 24 prompts, +-0.07.
    assert right["momentkv"] >= 0.7 and right["first order, int8"] >= 0.7 and right["streamingllm"] <= 0.5, right
