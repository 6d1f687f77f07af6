"""A run's tasks in worker processes: every result is written when it is there, and at the deadline what runs is ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
GRACE = 5
"""Seconds of a run's time that are kept for reading the results and writing them down."""

Task = dict[str, Any]


def share(tasks: list[Task], workers: int) -> list[list[Task]]:
    """Task i goes to worker i % workers, in order of importance."""
    return [part for i in range(workers) if (part := tasks[i::workers])]


def run(tasks: list[Task], workers: int, seconds: float, interpreted: bool) -> dict[str, Any]:
    """{"done": results with their tasks, "failed": messages likewise, "left": tasks that nobody got to}. Never takes longer."""
    end = time.monotonic() + seconds - GRACE
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, part in enumerate(share(tasks, workers)):
            path = Path(folder) / f"{number}.jsonl"
            job = json.dumps({"tasks": part, "interpreted": interpreted, "into": str(path)})
            env = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpreted else {})
            running.append(
                (subprocess.Popen([sys.executable, str(WORKER), job], env=env, start_new_session=True), path)
            )
        for process, _ in running:
            _wait(process, end)
        lines = [json.loads(line) for _, path in running for line in _lines(path)]
    finished = [line["task"] for line in lines]
    return {
        "done": [line for line in lines if "result" in line],
        "failed": [line for line in lines if "error" in line],
        "left": [task for task in tasks if task not in finished],
    }


def _wait(process: subprocess.Popen, end: float) -> None:
    """Until it ends or `end` comes; then it is ended, and what it started."""
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(path: Path) -> list[str]:
    """Whole lines: a worker may have been ended within one."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def work(job: dict[str, Any], do: Callable[[Task], Any]) -> None:
    """In a worker: its tasks, one after the other; a task that fails stops no other."""
    with open(job["into"], "w") as file:
        for task in job["tasks"]:
            for line in _outcome(task, do):
                file.write(json.dumps(line) + "\n")
                file.flush()


def _outcome(task: Task, do: Callable[[Task], Any]) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    try:
        result = {"result": do(task)}
    except Exception as error:  # noqa: BLE001  whatever it is, it is this task's
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    yield {"task": task, **result, "seconds": round(time.monotonic() - start, 2)}
