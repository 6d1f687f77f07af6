"""Every benchmark by name. `make bench` lists them, `make bench NAME=serving` runs one.

    PYTHONPATH=benchmarks python -m bench [NAME [ARGUMENTS]]

A result is `results/NAME.json`, with the machine and the targets. ARGUMENTS go to the last step; `--show` derives table, targets
and picture of a record (benchmark.py) from its last result.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = os.environ.get("DOCUMENTS", "shared/data/leval")
"""A folder of L-Eval's tasks, or a checkout of LongBench."""
HELD_OUT = "build/held_out.txt"


@dataclass(frozen=True)
class Step:
    """One program: `python -m module arguments`.

    output: file that its standard output goes to.
    """

    module: str
    arguments: str = ""
    output: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """minutes: on two cores. real_model: it is made first."""

    what: str
    minutes: int
    steps: tuple[Step, ...]
    real_model: bool = False


def one(what: str, minutes: int, module: str, arguments: str = "", **more) -> Benchmark:
    return Benchmark(what, minutes, (Step(module, arguments),), **more)


CODE = Step("test_model.code_text", output=HELD_OUT)
CODE_MODEL = (
    "--model benchmarks/test_model/code_checkpoint --tasks text --texts 48 --wording english "
    f"--text-file {HELD_OUT} --prefill chunked"
)
TOY_HEADS = (
    "--budgets 256 128 64 --prefill chunked --methods 'momentkv, measured heads' 'momentkv, equal heads' "
    "'keydiff, int4' keydiff streamingllm"
)
TRAIN = "--minutes 60 --out benchmarks/test_model/"

BENCHMARKS = {
    "serving": one("stock vLLM against momentkv: decode tokens/s, KV bytes, concurrency", 20, "serving.run"),
    "first_token": one(
        "time to the first token over stock's, also of the real model", 12, "serving.first_token", real_model=True
    ),
    "load": one("vllm bench serve and GuideLLM at rising rates, both in one pool", 10, "load.run"),
    "prefix": one("prompt tokens saved under a shared system prompt", 5, "serving.prefix"),
    "resume": one("prompt tokens computed of conversations and documents that come again", 10, "serving.resume"),
    "drafts": one(
        "draft tokens accepted, stock against momentkv, on the real model", 15, "serving.drafts", real_model=True
    ),
    "kernels": one("C++ kernels against vLLM's own on the same tokens", 5, "kernels.run"),
    "store": one("attention over quantised stores against 16-bit ones", 5, "kernels.store"),
    "metrics_cost": one("what counting and sampling for the metrics cost", 2, "metrics_cost"),
    "dashboard": one("the Grafana dashboard's panels, drawn from a real run that a real Prometheus scrapes", 4, "dashboard"),
    "memory": one("where a CPU worker's memory grows, with and without a limit on oneDNN's cache", 15, "memory"),
    "soak": one("mixed traffic beside stock, the engine killed: no wrong token, no page held", 30, "soak.run", "--minutes 30"),
    "fuzz": one("10,000 random requests, aborts and disconnects, and schemathesis, also to stock", 60, "fuzz.run"),
    "quality": one(
        "the real model in the engine: KL, needles, answers, chat; all policies; resumed where it stopped (DOCUMENTS=...)",
        600, "evaluation.judge.run", f"--documents {DOCUMENTS} --half report --kinds all", real_model=True,
    ),
    "quality-simulator": one(
        "a small cell of every policy in the simulator, on the half for choosing settings (DOCUMENTS=...)",
        60, "evaluation.judge.run", f"--documents {DOCUMENTS} --backend simulator", real_model=True,
    ),
    "quality-toy": Benchmark(
        "the small test models in the engine: accuracy, KL and perplexity of all policies", 60,
        (
            Step("evaluation.quality.run", "--samples 8 --tasks ruler --budgets 512 256 128 64"), CODE,
            Step("evaluation.quality.run", f"{CODE_MODEL} --budgets 512 256 128 --out quality_code"),
        ),
    ),
    "heads-toy": Benchmark(
        "heads by what they hold, on the small test models: accuracy and KL", 10,
        (
            Step("evaluation.quality.run", f"--samples 8 --seeds 1 2 --tasks ruler --out toy_tasks {TOY_HEADS}"), CODE,
            Step("evaluation.quality.run", f"{CODE_MODEL} --texts 32 --out toy_code {TOY_HEADS}"),
        ),
    ),
    "unseen": one(
        "small models of other shapes, trained from their seeds first: needles, copies and KL", 35, "evaluation.unseen"
    ),
    "ablation": Benchmark(
        "the paper's ablation on a small model: its score, its correction, both, neither", 30,
        (CODE, Step("evaluation.quality.run", f"{CODE_MODEL} --budgets 256 128 --out ablation --methods snapkv 'snapkv, zeroth' "
                                   "'snapkv, first' 'paper, off' 'paper, zeroth' paper")),
    ),
    "states": one("the large table: states and scores in the simulator", 60, "research.state_search"),
    "rope": one("does RoPE wash out the mean key, layer by layer", 5, "research.rope"),
    "train-tasks": one("train the test model of tasks again", 60, "test_model.train", f"{TRAIN}checkpoint --data tasks"),
    "train-code": one("train the test model of code again", 60, "test_model.train", f"{TRAIN}code_checkpoint --data code"),
}  # fmt: skip


def listing() -> str:
    lines = [f"{name:18} {b.minutes:4} min  {b.what}" for name, b in BENCHMARKS.items()]
    return "\n".join(["make bench NAME=...", *lines])


def run(name: str, arguments: list[str]) -> int:
    """Its steps one after another, from the repository's root. Returns the first exit status that is not 0."""
    benchmark = BENCHMARKS[name]
    steps = [Step("real_model.make")] if benchmark.real_model else []
    steps += benchmark.steps
    for step in steps:
        command = [sys.executable, "-P", "-m", step.module, *shlex.split(step.arguments)]
        command += arguments if step is steps[-1] else []
        print(f"+ {shlex.join(command[3:])}", file=sys.stderr, flush=True)
        status = run_step(command, step.output)
        if status:
            return status
    return 0


def run_step(command: list[str], output: str | None) -> int:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("benchmarks", "tests/support"))
    environment = os.environ | {"PYTHONPATH": paths}
    if output is None:
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    target = ROOT / output
    target.parent.mkdir(exist_ok=True)
    with target.open("w") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file).returncode


def main() -> None:
    if len(sys.argv) < 2:
        print(listing())
        return
    name, *arguments = sys.argv[1:]
    if name not in BENCHMARKS:
        raise SystemExit(f"NAME={name!r} is no benchmark: one of {', '.join(BENCHMARKS)}")
    sys.exit(run(name, arguments))


if __name__ == "__main__":
    main()
