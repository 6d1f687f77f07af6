"""Running text in English for the real model, about 3,900 of its tokens: that of the demo, which stays as it is. What a model says of
a page of docs/ changes when somebody edits the page."""

from pathlib import Path

DATA = Path(__file__).parents[2] / "benchmarks/demo/data"
TEXT = "\n".join((DATA / f"{name}.txt").read_text() for name in ("lighthouse", "minutes", "robot"))
