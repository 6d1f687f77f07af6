"""Writes codes.jsonl: 8 texts of about 1,000 tokens, the passwords of four places hidden in each.

python docs/clients/lm_eval_tasks/make.py
"""

import json
import random
from pathlib import Path

DATA = Path(__file__).with_name("codes.jsonl")
PLACES = ("harbour", "library", "garden", "station", "museum", "bakery", "school", "tower")
WORDS = (
    "copper",
    "velvet",
    "thunder",
    "lemon",
    "marble",
    "falcon",
    "winter",
    "pepper",
    "silver",
    "candle",
    "river",
    "cotton",
)
WHO = ("The clerk", "An old sailor", "The new teacher", "A visitor", "The mayor", "Her neighbour", "The baker")
DID = ("counted the chairs in the hall", "waited for the morning train", "painted the fence again", "read the letter twice",
       "walked along the canal", "repaired the clock on the wall", "carried the boxes upstairs")  # fmt: skip
THEN = ("and went home before it rained", "while the others were at lunch", "because nobody else had the time",
        "and said nothing about it", "as on every Tuesday", "until the lamps were lit")  # fmt: skip
SENTENCES, TEXTS = 66, 8


def rows() -> list[dict]:
    rng, found = random.Random(0), []
    for number in range(TEXTS):
        words, places = rng.sample(WORDS, 4), rng.sample(PLACES, 4)
        text = [f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(THEN)}." for _ in range(SENTENCES)]
        for word, place in zip(words, places, strict=True):
            text.insert(rng.randrange(len(text)), f"The password of the {place} is {word}.")
        answer = number % 4
        found.append({"text": " ".join(text), "place": places[answer], "words": words, "answer": answer})
    return found


def main() -> None:
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows()))


if __name__ == "__main__":
    main()
