"""Small Llamas of other shapes, words and seeds than the test models: what a default does on models that it was not chosen on.

Each learns to answer needles and to repeat a passage word for word, whatever lies between; all is asked at the end of a text.
Trained from their seeds where they are needed (build/unseen), in a few minutes each.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from test_model.model import Model, Shape, rope, rotate, save_checkpoint
from test_model.tokenizer import word_tokenizer
from test_model.train import STEP_TOKENS, base_rates, optimizers, scaled, train_step

CONTEXTS = (64, 128, 256, 512, 1024)
LEARNED, KNOWN = 0.8, 0.5
"""Mean answer loss at which a longer context follows, and at which the last one ends."""
DECAY_STEPS = 150
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "=", ";", "?", "[", "]"]
TOPICS = 6
SHARED, SHARED_WEIGHT, FAST = 1.0, 4.0, 4


def look_back(model: Model) -> None:
    """Let the first head begin as one that looks at the token before: copying grows out of such heads, which else take long
    to form. Its queries and keys read a number that all embeddings share."""
    shape = model.shape
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = SHARED
        cos, sin = rope(2, shape.head_dim, shape.rope_theta)
        fast = torch.arange(shape.head_dim) % (shape.head_dim // 2) < FAST  # the frequencies that tell neighbours apart
        attention = model.layers[0].self_attn
        for name, at in (("q_proj", 0), ("k_proj", 1)):
            rows = attention[name].weight[: shape.head_dim]
            rows.zero_()
            rows[:, 0] = rotate(fast * SHARED_WEIGHT, cos[at], sin[at])
        attention["o_proj"].weight[:, : shape.head_dim].normal_(std=shape.hidden**-0.5)


@dataclass(frozen=True)
class Text:
    """tokens: of the text; marks: which of them are answers."""

    tokens: list[str]
    marks: list[bool]


@dataclass(frozen=True)
class Recipe:
    """A model. words: of its vocabulary; chains: filler follows itself as text does, else it is noise."""

    name: str
    shape: Shape
    words: int
    seed: int
    chains: bool = True
    most_steps: int = 4000

    @property
    def vocabulary(self) -> list[str]:
        return MARKS + [word for kind in self.kinds.values() for word in kind]

    @property
    def kinds(self) -> dict[str, list[str]]:
        """Words by what they are used for."""
        each = (self.words - len(MARKS)) // 4
        return {kind: [f"{kind}{n:03}" for n in range(each)] for kind in "kvpf"}

    def filler(self, rng: random.Random, count: int) -> list[str]:
        words = self.kinds["f"]
        if not self.chains:
            return rng.choices(words, k=count)
        order = words[:]
        random.Random(1000 * self.seed + rng.randrange(TOPICS)).shuffle(order)
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        rare = rng.sample(words, 4)
        found = [rng.choice(order)]
        while len(found) < count:
            found.append(rng.choice(rare) if rng.random() < 0.2 else following[found[-1]])
        return found[:count]

    def needle(self, rng: random.Random, key: str) -> tuple[list[str], list[str], list[str]]:
        """(what stands in the text, question, answer)."""
        value = rng.choice(self.kinds["v"])
        return ["=", key, value, ";"], ["?", key], [value]

    def passage(self, rng: random.Random, length: int) -> tuple[list[str], list[str], list[str]]:
        """Likewise: to be repeated from its second word on. No word comes twice."""
        words = rng.sample(self.kinds["p"], min(length, len(self.kinds["p"])))
        return ["[", *words, "]"], ["[", *words[:2]], [*words[2:], "]"]

    def text(self, rng: random.Random, tokens: int, facts: list, asked: int) -> Text:
        """The first `asked` of `facts` are asked at the end; those and the others lie anywhere in filler."""
        tail: list[str] = []
        marks: list[bool] = []
        for _, question, answer in facts[:asked]:
            tail += question + answer
            marks += [False] * len(question) + [True] * len(answer)
        pieces = [piece for piece, _, _ in facts]
        rng.shuffle(pieces)
        room = tokens - 1 - len(tail) - sum(map(len, pieces))
        filler = self.filler(rng, max(room, 0))
        body, last = ["<s>"], 0
        for piece, place in zip(pieces, sorted(rng.randint(0, max(room, 0)) for _ in pieces), strict=True):
            body += filler[last:place] + piece
            last = place
        body += filler[last:]
        return Text(body + tail, [False] * len(body) + marks)

    def training_text(self, rng: random.Random, tokens: int) -> Text:
        # Short texts are facts alone: that is where copying begins.
        facts, left = [], tokens - 4 if tokens <= CONTEXTS[1] else tokens * 2 // 3
        length = rng.randint(6, max(16, min(40, tokens // 6)))
        facts.append(self.passage(rng, length))
        count = max(1, min(12, (left - 2 * length) // 7))
        facts += [self.needle(rng, key) for key in rng.sample(self.kinds["k"], count)]
        rng.shuffle(facts)
        made = self.text(rng, tokens, facts, len(facts))
        return Text(made.tokens[-tokens:], made.marks[-tokens:])

    def batch(self, rng: random.Random, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks, both [rows, tokens]."""
        made = [self.training_text(rng, tokens) for _ in range(rows)]
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        ids = torch.tensor([[numbers[word] for word in text.tokens] for text in made])
        return ids, torch.tensor([text.marks for text in made])

    def train(self, folder: Path) -> None:
        """Into `folder`, a Hugging Face checkpoint. Raises RuntimeError if it has not learned after `most_steps`."""
        torch.manual_seed(self.seed)
        rng, model = random.Random(self.seed), Model(len(self.vocabulary), self.shape)
        look_back(model)
        opts = optimizers(model)
        rates = base_rates(opts)
        stage, running, left = 0, 3.0, -1
        for number in range(self.most_steps):
            context = CONTEXTS[stage if rng.random() < 0.8 else rng.randint(0, stage)]
            factor = left / DECAY_STEPS if left >= 0 else 1.0
            batch = self.batch(rng, STEP_TOKENS // context, context)
            judged = train_step(model, opts, scaled(rates, factor), *batch)
            if context == CONTEXTS[stage]:
                running = 0.95 * running + 0.05 * judged
            if number % 25 == 0:
                print(f"{self.name}: step {number}, context {CONTEXTS[stage]}, answer loss {running:.3f}", flush=True)
            if left >= 0:
                left -= 1
                if left < 0:
                    save_checkpoint(model, folder, CONTEXTS[-1])
                    word_tokenizer(self.vocabulary).save_pretrained(folder)
                    return
            elif stage == len(CONTEXTS) - 1:
                left = DECAY_STEPS if running < KNOWN else -1
            elif running < LEARNED:
                stage, running = stage + 1, 3.0
        raise RuntimeError(f"{self.name}: answer loss {running:.3f} after {self.most_steps} steps")


RECIPES = (
    Recipe("two layers", Shape(128, 2, 2, 2, 64, 256, 10_000.0), words=97, seed=11, chains=False),
    Recipe("grouped", Shape(96, 4, 4, 2, 32, 192, 100_000.0), words=129, seed=12),
    Recipe("one KV head", Shape(128, 2, 4, 1, 64, 256, 2_000.0), words=97, seed=13, chains=False),
)
