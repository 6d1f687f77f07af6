"""LongBench's loader and metrics over a small folder in its format; expected scores are worked out by hand."""

import json

import pytest
from evaluation.quality.longbench import METRICS, load, score
from evaluation.quality.questions import expand, longbench_questions
from tiny_models import save_tokenizer
from transformers import AutoTokenizer

ROWS = [
    {"input": "w1 ?", "context": " ".join(f"w{i}" for i in range(100)), "answers": ["w2", "w3"], "all_classes": None},
    {"input": "w7 ?", "context": "w8 w9", "answers": ["w8"], "all_classes": ["w8", "w9"]},
    {"input": "w5 ?", "context": "w6", "answers": [12], "all_classes": None},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "config/dataset2prompt.json").write_text(json.dumps({"qasper": "w0 {context} w0 {input}"}))
    (tmp_path / "config/dataset2maxlen.json").write_text(json.dumps({"qasper": 8}))
    (tmp_path / "data/qasper.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return tmp_path


def test_examples_are_those_of_the_folder(folder, tokenizer):
    found = {e.prompt: e for e in load(folder, "qasper", tokenizer, 200, 10, seed=1)}
    assert set(found) == {f"w0 {r['context']} w0 {r['input']}" for r in ROWS}
    assert all(e.task == "qasper" and e.answer_tokens == 8 for e in found.values())
    assert found["w0 w8 w9 w0 w7 ?"].answers == ("w8",) and found["w0 w8 w9 w0 w7 ?"].classes == ("w8", "w9")
    assert found["w0 w6 w0 w5 ?"].answers == ("12",) and found["w0 w6 w0 w5 ?"].classes == ()


def test_a_seed_draws_the_same_examples(folder, tokenizer):
    draws = [[e.prompt for e in load(folder, "qasper", tokenizer, 200, 2, seed)] for seed in (*range(8), *range(8))]
    assert draws[:8] == draws[8:]
    assert all(len(set(d)) == 2 for d in draws) and len({tuple(d) for d in draws}) > 1


def test_long_prompts_lose_their_middle(folder, tokenizer):
    """104 tokens into 28 - 8 for the answer: ten from either end."""
    (cut,) = [e.prompt for e in load(folder, "qasper", tokenizer, 28, 3, 1) if "w99" in e.prompt]
    head, tail = ["w0", *(f"w{i}" for i in range(9))], [*(f"w{i}" for i in range(93, 100)), "w0", "w1", "<unk>"]
    # Decoding leaves no space between the halves: their last and first word are one.
    assert cut.split() == [*head[:-1], head[-1] + tail[0], *tail[1:]]


def test_missing_files_and_unknown_tasks_are_named(folder, tokenizer):
    with pytest.raises(ValueError, match="'lsht' is not one of narrativeqa, qasper"):
        load(folder, "lsht", tokenizer, 200, 1, 1)
    with pytest.raises(FileNotFoundError, match=r"data/trec\.jsonl is missing: --longbench wants"):
        load(folder, "trec", tokenizer, 200, 1, 1)
    with pytest.raises(ValueError, match="answers with 8 tokens, --context 8 is too small"):
        load(folder, "qasper", tokenizer, 8, 1, 1)
    (folder / "config/dataset2maxlen.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset2maxlen\.json is missing"):
        load(folder, "qasper", tokenizer, 200, 1, 1)
    with pytest.raises(ValueError, match="--tasks qasper needs --longbench FOLDER"):
        longbench_questions(["qasper"], None, tokenizer, 200, 1, 1, False)
    with pytest.raises(ValueError, match="--tasks lsht: not one of ruler, longbench, niah_single_1"):
        expand(["longbench", "lsht"])


def test_questions_score_what_is_said(folder, tokenizer):
    """Also: few-shot and code tasks are never asked as chat, and a chat template has its room."""
    for name in ("dataset2prompt", "dataset2maxlen"):
        path = folder / f"config/{name}.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lcc": config["qasper"]}))
    (folder / "data/lcc.jsonl").write_text((folder / "data/qasper.jsonl").read_text())
    asked = longbench_questions(["qasper", "lcc"], folder, tokenizer, 104, 3, 1, chat=True)
    assert [(q.task, q.chat) for q in asked] == [("qasper", True)] * 3 + [("lcc", False)] * 3
    longest = [max(len(q.prompt.split()) for q in asked if q.task == t) for t in ("qasper", "lcc")]
    assert longest == [104 - 2 - 64 - 8 - 1, 104 - 2 - 8 - 1]
    (one,) = [q for q in asked if q.task == "qasper" and q.prompt == "w0 w8 w9 w0 w7 ?"]
    assert one.score("w8") == 1.0 and one.score("the w8 or so") == 0.5 and one.score("w9") == 0.0


@pytest.mark.parametrize(
    ("task", "said", "answers", "classes", "expected"),
    [
        # f1: lower case, no punctuation, no articles; 2 of 3 said words are 2 of 2.
        ("qasper", "The red, red fox.", ["red fox"], (), 2 * 2 / (3 + 2)),
        ("qasper", "red red fox", ["red red"], (), 2 * 2 / (3 + 2)),
        ("hotpotqa", "a the", ["an"], (), 0.0),
        ("musique", "", ["fox"], (), 0.0),
        ("2wikimqa", "fox", ["dog", "Fox!"], (), 1.0),
        # A few-shot answer ends with its line; leading empty lines do not count.
        ("triviaqa", "\n\nfox\nQuestion: dog", ["fox"], (), 1.0),
        ("qasper", "fox\ndog", ["fox"], (), 2 * 1 / (2 + 1)),
        # rouge_l: the longest common subsequence "the cat sat" of 5 and 4 words, in order.
        ("gov_report", "The cat, then, sat down", ["the black cat sat"], (), 2 * 3 / (5 + 4)),
        ("qmsum", "sat cat", ["cat sat"], (), 0.5),
        ("multi_news", "", ["cat"], (), 0.0),
        ("multi_news", "...", ["..."], (), 0.0),
        ("samsum", "cat sat\ndog", ["cat sat"], (), 1.0),
        # classification: shared by all classes named; a class inside the right one's name is not another one.
        ("trec", "Other entity", ["Other entity"], ("Other entity", "Date", "entity"), 1.0),
        ("trec", "Date or Place", ["Date"], ("Date", "Place"), 0.5),
        ("trec", "Place", ["Date"], ("Date", "Place"), 0.0),
        ("trec", "", ["Date"], ("Date",), 0.0),
        # numbers: the share of those said.
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], (), 1.0),
        ("passage_retrieval_en", "Paragraph 1 or 12, so 12", ["Paragraph 12"], (), 2 / 3),
        ("passage_retrieval_en", "Paragraph 120", ["Paragraph 12"], (), 0.0),
        ("passage_count", "5 or 6", ["5"], (), 0.5),
        ("passage_count", "five", ["5"], (), 0.0),
        # code: the first line without comment or fence; "x = y" in "x = yz" are 5 characters of 5 and 6.
        ("lcc", "```python\n# hm\nx = y\nz", ["x = yz"], (), 2 * 5 / (5 + 6)),
        ("lcc", "\n\nx = 1", ["x = 1"], (), 1.0),
        ("repobench-p", "ba", ["ab"], (), 0.5),
        ("repobench-p", "# only a comment", ["x"], (), 0.0),
        ("repobench-p", "", ["x"], (), 0.0),
    ],
)  # fmt: skip
def test_scores(task, said, answers, classes, expected):
    assert score(task, said, answers, classes) == pytest.approx(expected)


def test_every_task_gives_a_perfect_answer_one():
    for task in METRICS:
        answer = "Paragraph 7" if task == "passage_retrieval_en" else "7" if task == "passage_count" else "seven cats"
        assert score(task, answer, [answer], (answer, "other")) == 1.0, task
