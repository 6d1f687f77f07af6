"""Train the test model from scratch on a CPU and save it as a Hugging Face checkpoint.

    make bench NAME=train-tasks        the tasks model: synthetic long-context tasks (documents.py)
    make bench NAME=train-code   the code model: real text (code_text.py)

Curriculum over the context length: a stage ends when its running answer loss is low. Muon for the matrices, AdamW for the
rest (experiments: AdamW alone needs several times more steps to form the induction heads).
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from test_model.code_text import CodeText
from test_model.documents import WORDS, document
from test_model.model import Model, load_checkpoint, save_checkpoint
from test_model.tokenizer import save_tokenizer

TASK_STAGES = ((64, 0.6), (128, 0.6), (256, 0.7), (512, 0.7), (1024, 0.7), (2048, 0.0))
"""(context tokens, answer loss at which the stage ends)."""
CODE_STAGES = ((256, 0.0), (512, 0.0), (2048, 0.0))
"""Without answers only the time ends a stage."""
STEP_TOKENS = 4096
TEXT_WEIGHT = 0.15
DECAY_SHARE = 0.3
RESUME_FACTOR = 0.2


class Tasks:
    """Training batches of synthetic documents."""

    vocabulary = len(WORDS)
    ids = {w: i for i, w in enumerate(WORDS)}

    def batch(self, rng: random.Random, rows: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and answer marks, both [rows, context]."""
        made = [document(rng, context) for _ in range(rows)]
        ids = torch.tensor([[self.ids[w] for w in words] for words, _ in made])
        return ids, torch.tensor([marks for _, marks in made])

    def save_tokenizer(self, folder: Path) -> None:
        save_tokenizer(folder)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    return [muon, torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def step_loss(model: Model, ids: torch.Tensor, marks: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weighted loss; and the mean loss on answer tokens, on all if there are none."""
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    answer = marks[:, 1:].flatten().float()
    weight = answer + TEXT_WEIGHT * (1 - answer)
    total = (loss * weight).sum() / weight.sum()
    return total, ((loss * answer).sum() / answer.sum()).item() if answer.any() else total.item()


def base_rates(opts: list[torch.optim.Optimizer]) -> list[list[float]]:
    """Learning rates by optimiser and group, before any schedule."""
    return [[group["lr"] for group in opt.param_groups] for opt in opts]


def train_step(
    model: Model, opts: list[torch.optim.Optimizer], rates: list[list[float]], ids: torch.Tensor, marks: torch.Tensor
) -> float:
    """One step at these learning rates; the mean loss of `step_loss`."""
    loss, judged = step_loss(model, ids, marks)
    loss.backward()
    for opt, of_groups in zip(opts, rates, strict=True):
        for group, rate in zip(opt.param_groups, of_groups, strict=True):
            group["lr"] = rate
        opt.step()
        opt.zero_grad()
    return judged


def scaled(rates: list[list[float]], factor: float) -> list[list[float]]:
    return [[rate * factor for rate in of_groups] for of_groups in rates]


def schedule(minutes: float, resume: bool) -> Iterator[float]:
    """Learning-rate factor for each step until the time is over: constant, then linear decay.

    A resumed run starts low and only decays: at the full rate a trained model was lost again (answer loss 0.07 -> 1.7).
    """
    start = time.monotonic()
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield RESUME_FACTOR * (1 - done) if resume else min(1.0, (1 - done) / DECAY_SHARE)


def train(data: Tasks | CodeText, minutes: float, seed: int, out: Path, resume: bool = False) -> None:
    """Train for `minutes`; `resume` continues from the checkpoint in `out` at its last stage."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Model(data.vocabulary)
    if resume:
        load_checkpoint(model, out)
    opts = optimizers(model)
    rates = base_rates(opts)
    # A stage also ends after this share of the time: the long contexts must have theirs.
    stages, stage_share = (TASK_STAGES, 0.12) if isinstance(data, Tasks) else (CODE_STAGES, 0.3)
    stage, running, began = (len(stages) - 1 if resume else 0), 3.0, time.monotonic()

    def save() -> None:
        save_checkpoint(model, out, stages[stage][0])
        data.save_tokenizer(out)

    for number, factor in enumerate(schedule(minutes, resume)):
        # Past lengths stay in the mix so that short contexts are not forgotten.
        context = stages[stage if rng.random() < 0.8 else rng.randint(0, stage)][0]
        batch = data.batch(rng, max(1, STEP_TOKENS // context), context)
        judged = train_step(model, opts, scaled(rates, factor), *batch)
        if context == stages[stage][0]:
            running = 0.97 * running + 0.03 * judged
        share = (time.monotonic() - began) / (60 * minutes)
        if stage < len(stages) - 1 and (running < stages[stage][1] or stage_share * (stage + 1) < share):
            save()
            stage, running = stage + 1, 3.0
        if number % 50 == 0:
            minute = (time.monotonic() - began) / 60
            print(f"{minute:5.1f} min  step {number}  context {stages[stage][0]}  loss {running:.3f}", flush=True)
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("tasks", "code"), default="tasks")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    train(Tasks() if args.data == "tasks" else CodeText(), args.minutes, args.seed, args.out, args.resume)


if __name__ == "__main__":
    main()
