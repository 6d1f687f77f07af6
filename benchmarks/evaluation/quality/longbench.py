"""LongBench (Bai et al., arXiv 2308.14508) over a local copy: loader, prompts and metrics.

The folder is a checkout of the data set: `data/TASK.jsonl` with the fields input, context, answers, all_classes, and
`config/dataset2prompt.json`, `config/dataset2maxlen.json` (prompts and answer lengths come from there, not from us).
Only the English and code tasks: the Chinese ones need a word segmenter.
"""

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One prompt and what its answer is judged by."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    answer_tokens: int


def _plain(text: str) -> list[str]:
    """Lower case, no punctuation, no articles: how SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(said: str, answer: str, classes: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words."""
    a, b = _plain(said), _plain(answer)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> float:
    """F-measure of the longest common subsequence: 2 x its length / both lengths; 0 when either is empty."""
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for i, y in enumerate(b, 1):
            before, lengths[i] = lengths[i], before + 1 if x == y else max(lengths[i], lengths[i - 1])
    return 2 * lengths[-1] / (len(a) + len(b)) if a and b else 0.0


def rouge_l(said: str, answer: str, classes: Sequence[str]) -> float:
    """ROUGE-L of the whole texts over words in lower case (LongBench's package unites the sentences' subsequences)."""
    return _common_subsequence(*(re.findall(r"[a-z0-9]+", text.lower()) for text in (said, answer)))


def classification(said: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes named, if the right one is among them; a class inside the right one's name does not count."""
    named = [c for c in classes if c in said and not (c in answer and c != answer)]
    return 1 / len(named) if answer in named else 0.0


def _share_of_numbers(said: str, number: str) -> float:
    numbers = re.findall(r"\d+", said)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def retrieval(said: str, answer: str, classes: Sequence[str]) -> float:
    """Share of the numbers said that are the paragraph's ("Paragraph 12")."""
    return _share_of_numbers(said, re.findall(r"\d+", answer)[0])


def count(said: str, answer: str, classes: Sequence[str]) -> float:
    """Share of the numbers said that are the answer."""
    return _share_of_numbers(said, str(answer))


def code(said: str, answer: str, classes: Sequence[str]) -> float:
    """Edit similarity (insertions and deletions) of the first line that is neither a comment nor a fence."""
    lines = [x for x in said.lstrip("\n").split("\n") if not any(mark in x for mark in ("`", "#", "//"))]
    return _common_subsequence(lines[0] if lines else "", answer)


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "narrativeqa": f1, "qasper": f1, "multifieldqa_en": f1, "hotpotqa": f1, "2wikimqa": f1, "musique": f1,
    "gov_report": rouge_l, "qmsum": rouge_l, "multi_news": rouge_l, "trec": classification, "triviaqa": f1,
    "samsum": rouge_l, "passage_retrieval_en": retrieval, "passage_count": count, "lcc": code, "repobench-p": code,
}  # fmt: skip
FEW_SHOT = ("trec", "triviaqa", "samsum")
"""Their answer is the first line; the model would go on with the next example."""
RAW = (*FEW_SHOT, "lcc", "repobench-p")
"""Never wrapped in a chat template."""


def load(
    folder: Path, task: str, tokenizer: PreTrainedTokenizerBase, context: int, most: int, seed: int
) -> list[Example]:
    """`most` examples drawn by `seed` (all of them if there are fewer), prompts cut in the middle to `context` tokens.

    Raises:
        ValueError: unknown task, or no room for a prompt. FileNotFoundError: the folder is no copy of LongBench.
    """
    if task not in METRICS:
        raise ValueError(f"LongBench task {task!r} is not one of {', '.join(METRICS)}")
    config = {name: folder / f"config/dataset2{name}.json" for name in ("prompt", "maxlen")}
    data = folder / f"data/{task}.jsonl"
    for path in (*config.values(), data):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: --longbench wants a checkout of the LongBench data set")
    template = json.loads(config["prompt"].read_text())[task]
    answer_tokens = json.loads(config["maxlen"].read_text())[task]
    if answer_tokens >= context:
        raise ValueError(
            f"LongBench task {task!r} answers with {answer_tokens} tokens, --context {context} is too small"
        )
    rows = [json.loads(line) for line in data.read_text().splitlines() if line.strip()]
    random.Random(seed).shuffle(rows)
    return [
        Example(
            task,
            _cut(template.format(**row), tokenizer, context - answer_tokens),
            tuple(str(a) for a in row["answers"]),
            tuple(row.get("all_classes") or ()),
            answer_tokens,
        )
        for row in rows[:most]
    ]


def _cut(prompt: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """LongBench keeps both ends of a prompt that is too long."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if len(ids) <= tokens:
        return prompt
    half = tokens // 2
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :])


def score(task: str, said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best over all reference answers, 0 to 1."""
    if task in FEW_SHOT:
        said = said.lstrip("\n").split("\n")[0]
    return max(METRICS[task](said, answer, classes) for answer in answers)
