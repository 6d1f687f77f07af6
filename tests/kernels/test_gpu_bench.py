"""The GPU kit from its first line to its last, in Triton's interpreter and without vLLM: what a GPU machine will run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
SCRIPT = GPU / "run.py"
sys.path.append(str(GPU))
import kit  # noqa: E402  no package


def without_vllm(tmp_path) -> dict[str, str]:
    """An environment in which vLLM cannot be imported, as on a bare GPU machine."""
    (tmp_path / "vllm.py").write_text("raise ImportError('not here')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_runs_without_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "A", "B", "C", "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_vllm(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {run: json.loads((tmp_path / f"gpu_{run}.json").read_text()) for run in "ABC"}
    for results in found.values():
        assert results["interpreted"] and "interpreter" in results["machine"]["gpu"] and results["machine"]["commit"]
        assert not results["failed"] and not results["left"]
    kinds = {run: {line["task"]["what"] for line in results["done"]} for run, results in found.items()}
    lines = kit.read(tmp_path / "gpu.jsonl")
    assert lines[0]["machine"] == found["A"]["machine"] and len(lines) == 1 + sum(
        len(r["done"]) for r in found.values()
    )
    assert len(list(tmp_path.glob("gpu*"))) <= 8, "no more files come back"
    assert kinds["A"] == {"life", "plan", "reads", "replay", "stores", "heads", "check"} and kinds["C"] == {"prefill"}
    assert kinds["B"] == {"copy", "decode", "context", "retire", "rounding", "variant", "step"}
    for line in found["A"]["done"]:
        # Of one head the output may be short.
        result, most = line["result"], 2**-5 if line["task"]["what"] == "heads" else 2**-6
        assert result.get("worst_relative_difference", 0) < most and result.get("retired_pages", 1) > 0, result
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "A: life" in done.stdout and "| triton |" in done.stdout


@pytest.mark.slow
def test_a_wrong_kernel_fails_and_times_nothing(tmp_path):
    """The gate in front of every figure: one number of every token off. What C times, `reads` of A has checked."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('TRITON_INTERPRET') == '1':\n"
        "    from momentkv_vllm.kernels import triton\n"
        "    attend, observing = triton.Triton.attend, triton.Triton.attend_and_observe\n"
        "    def wrong(self, cache, query, output, *rest):\n"
        "        attend(self, cache, query, output, *rest)\n"
        "        output[:, -1, 3] += 1.0\n"
        "    def also_wrong(self, cache, observed, query, output, *rest):\n"
        "        observing(self, cache, observed, query, output, *rest)\n"
        "        output[:, -1, 3] += 1.0\n"
        "    triton.Triton.attend, triton.Triton.attend_and_observe = wrong, also_wrong\n"
    )
    command = [sys.executable, str(SCRIPT), "A", "B", "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_vllm(tmp_path), cwd=tmp_path)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    failed = [json.loads((tmp_path / f"gpu_{run}.json").read_text())["failed"] for run in "AB"]
    assert all("AssertionError" in line["error"] for lines in failed for line in lines)
    kinds = [{line["task"]["what"] for line in lines} for lines in failed]
    assert kinds[0] >= {"life", "check", "reads"} and kinds[1] >= {"decode", "context"}


WORKER = """
import json, os, pathlib, subprocess, sys, time
sys.path.append({folder!r})
import kit
if os.environ.get("STANDS_STILL"):
    child = subprocess.Popen(["sleep", "100"])
def do(task):
    if task["what"] == "hangs":
        time.sleep(100)
    if task["what"] == "dies":
        os._exit(7)
    if task["what"] == "loses the GPU":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if task["what"] == "stands still":
        kit.append(pathlib.Path(task["into"]), {{"run": "A", "task": task, "result": {{"child": child.pid}}}})
        with open(task["into"], "a") as file:
            file.write('{{"run": "A", "task": "cut off')
            file.flush()
            time.sleep(100)
    return {{"process": os.getpid()}}
kit.work(pathlib.Path(sys.argv[1]), do)
"""


def run_of(monkeypatch, tmp_path, tasks, workers=1, seconds=60.0, task_seconds=50.0):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(folder=str(GPU)))
    monkeypatch.setattr(kit, "WORKER", worker)
    given = {"interpreted": False, "task_seconds": task_seconds}
    return kit.run("A", tasks, workers, time.monotonic() + seconds, tmp_path / "gpu.jsonl", given)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_ends_in_time_with_what_it_has(tmp_path, monkeypatch, workers):
    """Workers that hang, and what they started, are ended; what was done before is kept, in a file of its own."""
    monkeypatch.setenv("STANDS_STILL", "1")
    tasks = [{"what": "works", "i": i} for i in range(workers)]
    tasks += [
        {"what": "stands still", "into": str(tmp_path / "gpu.jsonl")},
        *({"what": "hangs", "i": i} for i in range(9)),
    ]
    start = time.monotonic()
    # Eight seconds for three processes to start, on a machine that has other work.
    found = run_of(monkeypatch, tmp_path, tasks, workers, kit.GRACE + 8)
    assert time.monotonic() - start < kit.GRACE + 8
    # Sorted: the worker that stands still may be quicker than another's first task.
    assert sorted(line["task"]["what"] for line in found["done"]) == ["stands still"] + ["works"] * workers
    assert found["left"] == tasks[workers + 1 :] and not found["failed"]
    while any(alive(line) for line in found["done"] if "child" in line["result"]):
        assert time.monotonic() - start < kit.GRACE + 28, "a signal takes a moment to arrive, not twenty seconds"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hangs", "given up after 2 s"),
        ("dies", "the worker ended with 7"),
        ("loses the GPU", "an illegal memory access"),
    ],
)
def test_a_task_that_ends_its_worker_ends_no_run(tmp_path, monkeypatch, what, says):
    """The rest is another worker's: after a CUDA error a process can do nothing more with the GPU."""
    tasks = [{"what": "before"}, {"what": what}, {"what": "after"}]
    found = run_of(monkeypatch, tmp_path, tasks, task_seconds=2.0)
    before, after = found["done"]
    assert (before["task"]["what"], after["task"]["what"]) == ("before", "after") and not found["left"]
    assert before["result"]["process"] != after["result"]["process"]
    (failed,) = found["failed"]
    assert failed["task"]["what"] == what and says in failed["error"]


def test_results_are_there_before_the_run_is_over(tmp_path):
    """A call that is cut off brings them back; a line that was being written is left out."""
    into = tmp_path / "gpu.jsonl"
    kit.append(into, {"run": "A", "task": {"what": "check"}, "result": 1})
    with open(into, "a") as file:
        file.write('{"run": "A", "ta')
    assert kit.read(into) == [{"run": "A", "task": {"what": "check"}, "result": 1}]


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_machine_that_lacks_what_every_run_needs_is_told_at_once(tmp_path, missing):
    """And what it has is printed first."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *more: None if name == {missing!r} else find(name, *more)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(SCRIPT), "A"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and time.monotonic() - start < 60, "a run takes minutes"
    assert f"no {missing} here" in done.stderr and "64 MiB" in done.stderr and done.stdout.startswith("python: 3.")


def test_a_machine_without_a_gpu_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "A"], capture_output=True, text=True, env=without_vllm(tmp_path)
    )
    assert done.returncode == 1 and "torch sees no GPU here (--interpret" in done.stderr, done.stderr[-500:]


def alive(line: dict) -> bool:
    """Whether what a worker started is still there."""
    state = Path(f"/proc/{line['result']['child']}/stat")
    try:
        return state.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_task_that_fails_stops_no_other(tmp_path):
    def do(task):
        if task["what"] == "fails":
            raise ValueError("as it must")
        return {"fine": True}

    into, job = tmp_path / "gpu.jsonl", tmp_path / "job.json"
    job.write_text(json.dumps({"run": "A", "into": str(into), "tasks": [{"what": "fails"}, {"what": "works"}]}))
    (tmp_path / "next").write_text("0")
    kit.work(job, do)
    first, second = kit.read(into)
    assert first["error"] == "ValueError: as it must" and second["result"] == {"fine": True}


def asked_of_runs(code):
    """What Python says that has the kit's folders on its path."""
    code = f"import sys; sys.path[:0] = {[str(GPU), str(GPU.parent)]!r}; import json, runs; print(json.dumps({code}))"
    return json.loads(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout)


def test_the_limits_fit_what_is_lent():
    """15 minutes in all, 10 a command; a start of a machine takes one or two."""
    seconds, task_seconds = asked_of_runs("[runs.SECONDS, runs.TASK_SECONDS]")
    assert sum(seconds[run] for run in "ABCE") <= 9 * 60 and seconds["D"] < 240
    assert sum(seconds.values()) <= 13 * 60 and all(task_seconds[run] < seconds[run] for run in seconds)


def test_what_is_served_by_default_is_asked_first():
    """An int4 store, in Triton; a run that is cut off has at least that."""
    tasks = asked_of_runs("{run: runs.tasks(run, False) for run in 'ABCE'}")
    for run in "ABC":
        first = [task for task in tasks[run] if "store" in task][0]
        assert first["store"] == "int4" and first["family"] == "triton", run
        assert all(task.get("family", "triton") == "triton" for task in tasks[run])
    assert {task["what"] for task in tasks["A"][:4]} == {"life", "replay", "reads"}
    assert {task["family"] for task in tasks["E"]} == {"cuda"}
    names = [json.dumps(task) for run in tasks.values() for task in run]
    assert len(names) == len(set(names))


def test_parts_of_vllm_hold_what_the_engine_needs_and_fit(tmp_path):
    import zipfile

    import pack

    wheel, other = tmp_path / "vllm-0.32.0.whl", tmp_path / "msgspec.whl"
    needed = {
        "vllm/__init__.py": b"x" * 500,
        "vllm/_C_stable_libtorch.abi3.so": os.urandom(3000),
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": os.urandom(2500),
        "vllm-0.32.0.dist-info/METADATA": b"Name: vllm",
        "msgspec/_core.so": os.urandom(900),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in needed.items():
            if not name.startswith("msgspec"):
                archive.writestr(name, content)
        archive.writestr("vllm/_moe_C_stable_libtorch.abi3.so", os.urandom(9000))
        archive.writestr("vllm/third_party/deep_gemm/x.py", b"no")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("msgspec/_core.so", needed["msgspec/_core.so"])
    paths = pack.write([wheel, other], tmp_path / "site", 4400)
    assert len(paths) == 2 and all(path.stat().st_size <= 4400 for path in paths)
    for path in paths:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(path), str(tmp_path / "there")], check=True)
    there = {
        str(p.relative_to(tmp_path / "there")): p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file()
    }
    assert there == needed
    with pytest.raises(ValueError, match="_C_stable_libtorch"):
        pack.parts([wheel], 2000)
