"""What everybody is asked: RULER and LongBench prompts with their scores, and running text for KL and perplexity."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.quality import longbench, ruler
from evaluation.quality.wording import Compact, English, Wording
from transformers import PreTrainedTokenizerBase

TEXT = "text"
GROUPS = {"ruler": tuple(ruler.TASKS), "longbench": tuple(longbench.METRICS)}
ENGLISH_SLACK_TOKENS = 24
"""A real model may say more than the bare answer: a space, an article, a full stop."""
CHAT_TOKENS = 64
"""Room for a chat template (Llama 3.1's takes 36)."""


@dataclass(frozen=True)
class Question:
    """`answer_tokens`: the most a model may say; `chat`: ask as a chat message; `score`: 0 to 1 for what it said."""

    task: str
    prompt: str
    answer_tokens: int
    chat: bool
    score: Callable[[str], float]


def expand(names: Sequence[str]) -> list[str]:
    """`ruler` and `longbench` stand for all their tasks. Raises ValueError on an unknown name."""
    known = [*GROUPS["ruler"], *GROUPS["longbench"], TEXT]
    tasks = [task for name in names for task in GROUPS.get(name, (name,))]
    for task in tasks:
        if task not in known:
            raise ValueError(f"--tasks {task}: not one of {', '.join([*GROUPS, *known])}")
    return tasks


def ruler_questions(
    tasks: Sequence[str], wording: Wording, tokenizer: PreTrainedTokenizerBase, context: int, samples: int,
    seeds: Sequence[int], chat: bool,
) -> list[Question]:  # fmt: skip
    """`samples` of every task and seed; prompt, template and answer fit `context` tokens."""
    slack = ENGLISH_SLACK_TOKENS if isinstance(wording, English) else 0
    length = context - 2 - slack - (CHAT_TOKENS if chat else 0)
    count = partial(_count_tokens, tokenizer)
    made = []
    for task in tasks:
        for seed in seeds:
            rng = random.Random(f"{task} {seed}")
            for _ in range(samples):
                one = ruler.sample(task, rng, wording, length, count)
                score = partial(ruler.score, task, references=one.references)
                made.append(Question(task, one.prompt, one.answer_tokens + slack, chat, score))
    return made


def longbench_questions(
    tasks: Sequence[str], folder: Path | None, tokenizer: PreTrainedTokenizerBase, context: int, samples: int, seed: int,
    chat: bool,
) -> list[Question]:  # fmt: skip
    """`samples` of every task, fewer where the data set has fewer. Raises ValueError without a folder."""
    if tasks and folder is None:
        raise ValueError(f"--tasks {tasks[0]} needs --longbench FOLDER, a checkout of the LongBench data set")
    made = []
    for task in tasks:
        asked_as_chat = chat and task not in longbench.RAW
        room = context - 2 - (CHAT_TOKENS if asked_as_chat else 0)
        for one in longbench.load(folder, task, tokenizer, room, samples, seed):
            score = partial(longbench.score, task, answers=one.answers, classes=one.classes)
            made.append(Question(task, one.prompt, one.answer_tokens, asked_as_chat, score))
    return made


def running_texts(
    wording: Wording, book: str, tokenizer: PreTrainedTokenizerBase, context: int, count: int
) -> list[str]:
    """`count` texts of about `context` tokens, at most: stretches of the book as they stand, or the wording's own text."""
    rng = random.Random("texts")
    if book:
        ids = tokenizer(book, add_special_tokens=False).input_ids
        starts = [rng.randrange(max(1, len(ids) - context)) for _ in range(count)]
        stretches = [ids[s : s + context] for s in starts]
    else:
        made = [" ".join(wording.text(rng, context)) for _ in range(count)]
        stretches = [tokenizer(text, add_special_tokens=False).input_ids for text in made]
    # A cut text may become a few tokens longer when it is read again.
    return [tokenizer.decode(ids[: context - 8]) for ids in stretches]


def make(args: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], list[str]]:
    """(questions, texts) for the command line of run.py. Raises ValueError on an unknown task."""
    tasks = expand(args.tasks)
    book = args.text_file.read_text() if args.text_file else ""
    wording = English(book) if args.wording == "english" else Compact()
    of_ruler = [t for t in tasks if t in GROUPS["ruler"]]
    of_longbench = [t for t in tasks if t in GROUPS["longbench"]]
    questions = ruler_questions(of_ruler, wording, tokenizer, args.context, args.samples, args.seeds, args.chat)
    number = args.samples * len(args.seeds)
    questions += longbench_questions(
        of_longbench, args.longbench, tokenizer, args.context, number, args.seeds[0], args.chat
    )
    return questions, running_texts(wording, book, tokenizer, args.context, args.texts) if TEXT in tasks else []


def _count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
