"""`make demo`: a real assistant answers questions over documents from a KV pool too small for stock vLLM.

Starts stock vLLM in a pool that is large enough, momentkv and streamingllm in a small one, and stock in the small one, which
refuses. Then it asks all the same questions and prints answers, facts found, agreement with stock, KV tokens held and the
concurrency that vLLM reports.  PYTHONPATH=benchmarks python -P -m demo.run
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import report
from demo import show
from demo.questions import Question, late, over_documents
from demo.session import NAME, Session, surprise
from real_model.folder import FOLDER, WHY_NOT
from server import Server

MAX_LEN, BUDGET, CHUNK = 4096, 512, 256
LARGE, SMALL = 4 * MAX_LEN, MAX_LEN // 2
"""KV tokens of the two pools: four of the longest sequences, and half of one."""
COMMON = ["--max-model-len", str(MAX_LEN), "--max-num-batched-tokens", str(CHUNK)]
EVICTING = ("momentkv", "streamingllm")
DTYPE = "float32 (default) reads prompts 4.5 times as fast as bfloat16 with AVX2, 2.4 with AVX-512, and 0.45 with its bf16 units"
"""Measured on this model's matrix products, 512 rows, one core."""


def start(model: Path, dtype: str, pool_tokens: int, folder: Path, eviction: str = "") -> Session:
    """A server that is starting; stock vLLM's without `eviction`."""
    page = 16 if eviction else 32  # stock on a CPU has multiples of 32
    options = ["--kv-eviction", eviction, "--kv-budget", str(BUDGET)] if eviction else []
    # One more: vLLM keeps a block for itself.
    options += ["--block-size", str(page), "--num-gpu-blocks-override", str(pool_tokens // page + 1)]
    options += ["--dtype", dtype, *COMMON]
    print(f"vllm serve {model.name} {' '.join(options)}", flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", 2))
    return Session(Server(model, *options, folder=folder, name=NAME, threads=threads), pool_tokens)


def refusal(server: Server) -> str:
    """Why stock does not start in the small pool. Raises RuntimeError if it does."""
    try:
        server.wait_ready()
    except RuntimeError:
        return re.search(r"ValueError: (To serve at least one request.*?)\. Try", server.log)[1]
    raise RuntimeError("stock vLLM starts in a pool of half its longest sequence: the demo shows nothing")


def ask(sessions: dict[str, Session]) -> list[Question]:
    """All questions to all servers, one server after another; stock first, whose side of the chat is everyone's."""
    questions, stock = over_documents(), sessions["stock"]
    history = stock.chat()
    for name, session in sessions.items():
        session.ask_all(name, questions, history)
        if session is stock:
            session.surprise = surprise([a.logprobs for a in session.answers])
        else:
            session.read(name, stock.answers)
    return [*questions, late(history)]


def demonstrate(model: Path, dtype: str, folder: Path) -> tuple[dict[str, Session], list[Question], str]:
    sessions, refused = {}, None
    try:
        sessions["stock"] = start(model, dtype, LARGE, folder)
        for name in EVICTING:
            sessions[name] = start(model, dtype, SMALL, folder, name)
        refused = start(model, dtype, SMALL, folder).server
        print("all four are starting, about a minute", flush=True)
        for session in sessions.values():
            session.server.wait_ready()
        why = refusal(refused)
        print(f"stock in the small pool: {why}", flush=True)
        return sessions, ask(sessions), why
    finally:
        for server in [s.server for s in sessions.values()] + ([refused] if refused else []):
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of a chat model; default: the real model's")
    parser.add_argument("--dtype", default="float32", help=DTYPE)
    args = parser.parse_args()
    if not args.model.is_dir():
        print(
            WHY_NOT if args.model == FOLDER else f"--model {args.model} is no folder of a checkpoint", file=sys.stderr
        )
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the servers would outlive a `timeout`
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sessions, questions, why = demonstrate(args.model.resolve(), args.dtype, Path(folder))
        table = show.rows(sessions, questions)  # reads the servers' logs
    seconds = round(time.monotonic() - began)
    print(f"{show.side_by_side(sessions, questions)}\n\n{report.table(table)}")
    show.plot(sessions, BUDGET, report.RESULTS / "demo.png")
    held = show.most_held(sessions["momentkv"])
    targets = [
        report.target("momentkv: KV tokens of one sequence, reading included", held, BUDGET + CHUNK, at_least=False)
    ]
    used = {"seconds": seconds, "dtype": args.dtype, "budget_tokens": BUDGET}
    results = {"table": table, "stock_in_the_small_pool": why, **used, **show.record(sessions, questions)}
    report.write("demo", results, targets)
    print(f"plot: {report.RESULTS / 'demo.png'}; {seconds} s in all")
    return 0 if all(t["ok"] for t in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
