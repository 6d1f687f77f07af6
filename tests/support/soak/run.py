"""Soak: mixed traffic on a real server in a tight KV pool, with its engine restarted and its worker killed.

    make bench NAME=soak

Before the traffic every request is asked alone; every answer in the traffic is compared with that one token by token, and at the
end, on a server that was restarted twice, all are asked alone again. Beside it stock vLLM takes the same traffic for as long as
the first life is: how much its memory grows is vLLM's own part.
"""

import argparse
import asyncio
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import report
from memory import PRIMITIVES, VARIABLE
from server import Server
from soak.catalog import NEAR_TIE, catalog, record, replay
from soak.memory import Memory
from soak.traffic import Traffic

MODEL = Path(__file__).parents[3] / "benchmarks/test_model/checkpoint"
# Float32, so that tokens are decided (catalog.NEAR_TIE).
COMMON = ["--dtype", "float32", "--max-num-batched-tokens", "256", "--max-num-seqs", "12", "--max-model-len", "4096"]
# Requests that are not done by then keep the server for ever: vLLM 0.32.0 kills its engine and waits for their answers.
COMMON += ["--shutdown-timeout", "20"]
# 80 pages of 16 tokens hold five sequences at their budget, of twelve.
MOMENTKV = [*COMMON, "--kv-eviction", "momentkv", "--kv-budget", "256", "--num-gpu-blocks-override", "81"]
# Stock refuses a pool that cannot hold its longest sequence.
STOCK = [*COMMON, "--num-gpu-blocks-override", "257"]
QUIET_SECONDS = 20
GRACE_SECONDS = 120


def leaked(server: Server) -> dict[str, float]:
    """What is not zero although nothing runs: pages, pool usage, requests. The gauges follow at the next step or look."""
    names = (
        "momentkv:live_pages",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    )
    end = time.monotonic() + QUIET_SECONDS
    while True:
        now = server.metrics(prefix="")
        held = {name: now[name] for name in names if now.get(name)}
        if not held or time.monotonic() > end:
            return held
        time.sleep(1)


def kill_worker(server: Server) -> str:
    """SIGKILL to the innermost process that vLLM started (its worker, or the engine core that holds it); its name."""
    processes = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "VLLM" in p.name()]
    victim = processes[-1]
    name = victim.name()
    victim.kill()
    return name


def ended(process: subprocess.Popen) -> int:
    """Exit code; after GRACE_SECONDS it is killed, as every supervisor does (then -9)."""
    try:
        return process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Soak:
    """One server at a time, ended by `with`, and what was seen of all of them."""

    def __init__(self, folder: Path, requests: int, options: list[str], core: str | None = None, seed: int = 0) -> None:
        self.folder = folder
        self.options = options
        self.core = core
        self.requests = catalog(requests, seed)
        self.traffic = Traffic(self.requests, seed)
        self.lives: list[dict[str, Any]] = []
        self.server = self._start()
        record(self.server.url, self.requests)

    def __enter__(self) -> "Soak":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def _start(self) -> Server:
        # By default oneDNN keeps what it compiles for every new number of tokens, longer than a soak: benchmarks/memory.py.
        limit = {VARIABLE: str(PRIMITIVES)}
        return Server(
            MODEL, *self.options, folder=self.folder, name="soak", binding=self.core, environment=limit
        ).wait_ready()

    def run(self, seconds: float, end: str) -> None:
        """One life: traffic, silence (nothing may be held), then `end` under traffic: "stop", "restart" or "kill worker"."""
        memory = Memory(self.server.process.pid)
        asyncio.run(self.traffic.run(self.server.url, seconds))
        life = {"seconds": seconds, "held_when_quiet": leaked(self.server), "memory": memory.stop(), "end": end}
        after = self.server.metrics(prefix="")
        life["preemptions"] = after["vllm:num_preemptions_total"]
        life["retired_pages"] = after.get("momentkv:retired_pages_total", 0)
        if end != "stop":
            life |= asyncio.run(self._fault(end))
        self.lives.append(life)
        if end == "stop":
            return
        self.server.stop()
        self.server = self._start()

    async def _fault(self, kind: str) -> dict[str, Any]:
        """The server ends while requests run: all of them come to an end, and so does the server."""
        self.traffic.faulty = True
        running = asyncio.create_task(self.traffic.run(self.server.url, 10))
        await asyncio.sleep(4)
        begin = time.monotonic()
        if kind == "restart":
            self.server.process.terminate()
            victim = "server (SIGTERM)"
        else:
            victim = kill_worker(self.server)
        code = await asyncio.to_thread(ended, self.server.process)
        exited = time.monotonic() - begin
        await running
        self.traffic.faulty = False
        return {"victim": victim, "exit_code": code, "exit_seconds": exited}

    def finish(self) -> dict[str, Any]:
        """The sequential run again, then what `check` judges."""
        again = replay(self.server.url, self.requests)
        self.server.stop()
        tokens = sum(len(r.tokens) for r in self.requests)
        return {
            "requests_known": len(self.requests),
            "tokens_known": tokens,
            "near_ties_in_them": sum(m < NEAR_TIE for r in self.requests for m in r.margins),
            "traffic": dict(sorted(self.traffic.counts.items())),
            "problems": self.traffic.problems[:20],
            "replay": again,
            "lives": self.lives,
        }


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of a soak."""
    lives, traffic = found["lives"], found["traffic"]
    totals = [life["memory"]["total"] for life in lives if life["memory"]]
    wrong = traffic.get("wrong", 0) + found["replay"]["wrong"]
    ties = (traffic.get("near tie", 0) + found["replay"]["near tie"]) / max(1, traffic["right"])
    targets = [
        report.target("answers with a wrong token", wrong, 0, at_least=False),
        report.target("share of answers that differ after a near tie", ties, 0.01, at_least=False),
        report.target("unexpected errors and answers to bad input", len(found["problems"]), 0, at_least=False),
        report.target(
            "lives with pages, pool or requests held", sum(bool(x["held_when_quiet"]) for x in lives), 0, False
        ),
        report.target("preemptions", sum(x["preemptions"] for x in lives), 1),
        report.target("retired pages", sum(x["retired_pages"] for x in lives), 1),
    ]
    if totals:
        growth = max(total["last_mib"] / total["first_mib"] - 1 for total in totals)
        targets.append(report.target("growth of resident memory after warm-up", growth, 0.02, at_least=False))
    return targets


def soak(running: Soak, plan: list[tuple[float, str]]) -> dict[str, Any]:
    """plan: seconds of traffic and how each life ends, the last one with "stop"."""
    for seconds, end in plan:
        print(f"{seconds:.0f} s of traffic, then {end}", file=sys.stderr, flush=True)
        running.run(seconds, end)
        print(json.dumps(running.lives[-1]), flush=True)
    return running.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak test of a momentkv server")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=96)
    args = parser.parse_args()
    seconds = 60 * args.minutes
    plan = [(0.6 * seconds, "restart"), (0.2 * seconds, "kill worker"), (0.2 * seconds, "stop")]
    with (
        tempfile.TemporaryDirectory() as folder,
        # A core each; and both answer alone before either has traffic, which the other's start might not survive.
        Soak(Path(folder), args.requests, MOMENTKV, "0") as ours,
        Soak(Path(folder), args.requests, STOCK, "1") as stock,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        found, beside = threads.map(soak, [ours, stock], [plan, [(plan[0][0], "stop")]])
    found["stock"] = beside
    targets = judge(found)
    report.write("soak", found, targets)
    if not all(t["ok"] for t in targets):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
