"""A run's tasks in worker processes. Every result is appended to a file the moment it is there: a run that is cut off leaves
what it had. A worker that hangs in a task or loses its GPU context is replaced; at the deadline what runs is ended."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
GRACE = 3
"""Seconds of a run's time that are kept for reading the results and writing them down."""
LOST = 3
"""What a worker returns whose GPU context is lost: every further call of it would fail."""

Task = dict[str, Any]


def run(run: str, tasks: list[Task], workers: int, end: float, into: Path, given: dict[str, Any]) -> dict[str, Any]:
    """{"done": results with their tasks, "failed": messages likewise, "left": tasks that nobody got through}.

    Args:
        end: of time.monotonic(), when it is over.
        into: the file that results are appended to, a line of JSON each.
        given: to the workers: "interpreted", and "task_seconds", after which a task is given up.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"run": run, "tasks": tasks, "into": str(into), **given}))
        (Path(folder) / "next").write_text("0")
        _watch(job, min(workers, len(tasks)), end - GRACE, given["task_seconds"], len(tasks))
    lines = [line for line in read(into) if line["run"] == run]
    finished = [line["task"] for line in lines]
    return {
        "done": [line for line in lines if "result" in line],
        "failed": [line for line in lines if "error" in line],
        "left": [task for task in tasks if task not in finished],
    }


def read(into: Path) -> list[dict[str, Any]]:
    """Whole lines: a worker may have been ended within one."""
    found = []
    for line in into.read_text().split("\n") if into.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _watch(job: Path, workers: int, end: float, task_seconds: float, tasks: int) -> None:
    running = [_start(job) for _ in range(workers)]
    try:
        while running and time.monotonic() < end:
            time.sleep(0.2)
            for worker in [w for w in running if w.poll() is not None or _hangs(job, w, task_seconds)]:
                running.remove(worker)
                _bury(job, worker, task_seconds)
                if worker.returncode and int((job.parent / "next").read_text() or 0) < tasks:
                    running.append(_start(job))
    finally:
        for worker in running:
            _end(worker)


def _start(job: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(WORKER), str(job)], start_new_session=True)


def _hangs(job: Path, worker: subprocess.Popen, seconds: float) -> bool:
    since = job.parent / f"since-{worker.pid}"
    return since.exists() and time.time() - since.stat().st_mtime > seconds


def _bury(job: Path, worker: subprocess.Popen, task_seconds: float) -> None:
    """Ends a worker that hangs; a task that it was ended in, or ended by, has failed."""
    hangs = worker.poll() is None
    if hangs:
        _end(worker)
    if worker.returncode not in (0, LOST):
        known, since = json.loads(job.read_text()), job.parent / f"since-{worker.pid}"
        task = known["tasks"][int(since.read_text())] if since.exists() else None
        error = f"given up after {task_seconds:.0f} s" if hangs else f"the worker ended with {worker.returncode}"
        append(Path(known["into"]), {"run": known["run"], "task": task, "error": error, "seconds": None})


def _end(worker: subprocess.Popen) -> None:
    """And what it started."""
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def work(job_path: Path, do: Callable[[Task], Any]) -> None:
    """In a worker: the next task that nobody has taken, until there is none; a task that fails stops no other."""
    job = json.loads(job_path.read_text())
    while (number := _take(job_path.parent / "next")) < len(job["tasks"]):
        (job_path.parent / f"since-{os.getpid()}").write_text(str(number))
        line = {"run": job["run"]} | _outcome(job["tasks"][number], do)
        append(Path(job["into"]), line)
        if "CUDA error" in line.get("error", ""):
            sys.exit(LOST)


def append(into: Path, line: dict[str, Any]) -> None:
    """In one write, which no other worker's gets into, on a line of its own also behind one that was cut off."""
    file = os.open(into, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"\n{json.dumps(line)}\n".encode())
    os.close(file)


def _take(path: Path) -> int:
    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = int(file.read())
        file.seek(0)
        file.write(str(number + 1))
    return number


def _outcome(task: Task, do: Callable[[Task], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        result = {"result": do(task)}
    except Exception as error:  # noqa: BLE001  whatever it is, it is this task's
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"task": task, **result, "seconds": round(time.monotonic() - start, 2)}
