"""What the demo showed: answers side by side, the table, the plot."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from demo.questions import Question, same_words
from demo.session import Session

HEADING = (
    "server", "right, over documents", "right, late in the chat", "same words as stock", "-log p per token of stock's answers",
    "most KV tokens of one sequence", "while it answers", "pool tokens", "concurrency at 4096",
)  # fmt: skip


def side_by_side(sessions: dict[str, Session], questions: Sequence[Question]) -> str:
    """Every question with what each server said; a cross before what misses the fact."""
    lines = []
    for number, question in enumerate(questions):
        asked = question.messages[-1]["content"].strip().splitlines()[-1]
        lines.append(f"\n{asked}  [{question.right[0]}]")
        for name, session in sessions.items():
            answer = session.answers[number].text
            mark = " " if question.is_right(answer) else "x"
            shown = textwrap.shorten(answer, 160, placeholder=" ...")
            lines.append(f"  {mark} {name:<13} {shown}")
    return "\n".join(lines)


def rows(sessions: dict[str, Session], questions: Sequence[Question]) -> list[list[str | float | int]]:
    """The table, the first row its heading. The last question is the chat's."""
    stock = sessions["stock"]
    table: list[list[str | float | int]] = [list(HEADING)]
    for name, session in sessions.items():
        right = [q.is_right(a.text) for q, a in zip(questions, session.answers, strict=True)]
        pairs = zip(stock.answers, session.answers, strict=True)
        same = [same_words(full.text, own.text) for full, own in pairs]
        table.append([
            name, f"{sum(right[:-1])} of {len(right) - 1}", "yes" if right[-1] else "no", sum(same) / len(same),
            session.surprise, most_held(session), held_at_end(session), session.pool_tokens, session.concurrency,
        ])  # fmt: skip
    return table


def record(sessions: dict[str, Session], questions: Sequence[Question]) -> dict[str, Any]:
    """Every answer, and what one sequence held over time, for the results' JSON."""
    answers = [
        {"question": q.messages[-1]["content"].splitlines()[-1], "right": q.right}
        | {name: session.answers[number].text for name, session in sessions.items()}
        for number, q in enumerate(questions)
    ]
    return {"answers": answers, "growth": {name: session.growth for name, session in sessions.items()}}


def most_held(session: Session) -> int:
    return round(max(held for _, held in session.growth))


def held_at_end(session: Session) -> int:
    """KV tokens in the last sample that was taken before the answer was complete."""
    return round([held for _, held in session.growth if held][-1])


def plot(sessions: dict[str, Session], budget: int, path: Path) -> None:
    with report.picture(path, size=(7, 4)) as axes:
        for name, session in sessions.items():
            axes.plot(*zip(*session.growth, strict=True), label=name)
        axes.axhline(budget, color="grey", linestyle=":", label=f"--kv-budget {budget}")
        axes.set(
            xlabel="seconds", ylabel="KV tokens it holds (vLLM's gauge)",
            title="One sequence reads a document, then answers",
        )  # fmt: skip
        axes.legend()
