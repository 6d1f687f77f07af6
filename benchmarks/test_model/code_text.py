"""Real text for a language model: the Python standard library's own source, which every machine here has.

Synthetic tasks need sharp heads and little else; a model of real text has the diffuse ones, on which evicted attention mass
counts. Every twentieth module (by a checksum of its path) is held out for the benchmarks.
"""

import random
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
LONGEST_LINE = 200
"""Files with longer lines are tables, not text."""
SKIPPED = ("site-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__")


@cache
def texts(held_out: bool) -> tuple[str, ...]:
    """Modules of the running interpreter's standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if (
            any(part in SKIPPED for part in path.relative_to(root).parts)
            or (zlib.crc32(name.encode()) % 20 == 0) != held_out
        ):
            continue
        text = path.read_text(errors="ignore")
        if text and max(map(len, text.splitlines()), default=0) <= LONGEST_LINE:
            found.append(text)
    return tuple(found)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(False), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class CodeText:
    """Training batches of consecutive tokens; modules follow each other, each begins with <s>."""

    def __init__(self) -> None:
        self.tokenizer = train_tokenizer()
        ids = [self.tokenizer(t).input_ids for t in texts(False)]
        random.Random(0).shuffle(ids)
        self.ids = torch.tensor([i for row in ids for i in row])
        self.vocabulary = VOCABULARY

    def batch(self, rng: random.Random, rows: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks (none), both [rows, context]."""
        starts = [rng.randrange(len(self.ids) - context) for _ in range(rows)]
        ids = torch.stack([self.ids[s : s + context] for s in starts])
        return ids, torch.zeros_like(ids, dtype=torch.bool)

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def main() -> None:
    """Print the held-out modules, one after the other: a --text-file for quality/run.py."""
    print("\n".join(texts(True)))


def held_out_rows(tokenizer: PreTrainedTokenizerFast, context: int, rows: int, seed: int) -> torch.Tensor:
    """[rows, context] ids, each the beginning of a stretch of some held-out module that is long enough."""
    rng = random.Random(seed)
    ids = [row for text in texts(True) if len(row := tokenizer(text).input_ids) >= context]
    out = []
    for _ in range(rows):
        row = rng.choice(ids)
        start = rng.randrange(len(row) - context + 1)
        out.append(row[start : start + context])
    return torch.tensor(out)


if __name__ == "__main__":
    main()
