"""The GPU kit from its first line to its last, in Triton's interpreter and without vLLM: what a GPU machine will run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
SCRIPT = GPU / "run.py"
sys.path.append(str(GPU))
import kit  # noqa: E402  no package


def without_vllm(tmp_path) -> dict[str, str]:
    """An environment in which vLLM cannot be imported, as on a bare GPU machine."""
    (tmp_path / "vllm.py").write_text("raise ImportError('not here')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_the_runs_without_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "A", "B", "C", "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_vllm(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {run: json.loads((tmp_path / f"gpu_{run}.json").read_text()) for run in "ABC"}
    for results in found.values():
        assert results["interpreted"] and "interpreter" in results["machine"]["gpu"] and results["machine"]["commit"]
        assert not results["failed"] and not results["left"]
    kinds = {run: {line["task"]["what"] for line in results["done"]} for run, results in found.items()}
    assert kinds["A"] == {"life", "plan", "replay", "check"} and kinds["C"] == {"prefill"}
    assert kinds["B"] == {"copy", "decode", "context", "retire", "variant", "step"}
    for line in found["A"]["done"]:
        result = line["result"]
        assert result.get("worst_relative_difference", 0) < 2**-6 and result.get("retired_pages", 1) > 0, result
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "A: life" in done.stdout and "| triton |" in done.stdout


def test_a_wrong_kernel_fails_and_times_nothing(tmp_path):
    """The gate in front of every figure: one number off, in run A and in run B."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('TRITON_INTERPRET') == '1':\n"
        "    from momentkv_vllm.kernels import triton\n"
        "    right = triton.Triton.attend\n"
        "    def wrong(self, cache, query, output, *rest):\n"
        "        right(self, cache, query, output, *rest)\n"
        "        output[-1, -1, 3] += 1.0\n"
        "    triton.Triton.attend = wrong\n"
    )
    command = [sys.executable, str(SCRIPT), "A", "B", "C", "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_vllm(tmp_path), cwd=tmp_path)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    failed = [json.loads((tmp_path / f"gpu_{run}.json").read_text())["failed"] for run in "ABC"]
    assert all("AssertionError" in line["error"] for lines in failed for line in lines)
    kinds = [{line["task"]["what"] for line in lines} for lines in failed]
    assert kinds[0] >= {"life", "check"} and kinds[1] >= {"decode", "context"} and kinds[2] == {"prefill"}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_ends_in_time_with_what_it_has(tmp_path, monkeypatch, workers):
    """Workers that hang, and what they started, are ended; what was done before is kept."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, subprocess, sys, time\n"
        "job = json.loads(sys.argv[1])\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "with open(job['into'], 'w') as file:\n"
        "    done = {'task': job['tasks'][0], 'result': {'child': child.pid}, 'seconds': 0}\n"
        '    file.write(json.dumps(done) + chr(10) + \'{"task": "cut off\')\n'
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(kit, "WORKER", worker)
    tasks = [{"what": f"task {i}"} for i in range(7)]
    start = time.monotonic()
    found = kit.run(tasks, workers, kit.GRACE + 2, False)
    assert time.monotonic() - start < kit.GRACE + 2
    assert [line["task"] for line in found["done"]] == tasks[:workers] and found["left"] == tasks[workers:]
    for line in found["done"]:
        state = Path(f"/proc/{line['result']['child']}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_task_that_fails_stops_no_other(tmp_path):
    def do(task):
        if task["what"] == "fails":
            raise ValueError("as it must")
        return {"fine": True}

    into = tmp_path / "results"
    kit.work({"into": str(into), "tasks": [{"what": "fails"}, {"what": "works"}]}, do)
    first, second = map(json.loads, into.read_text().splitlines())
    assert first["error"] == "ValueError: as it must" and second["result"] == {"fine": True}


def test_the_limits_fit_what_is_lent():
    """15 minutes in all, 10 a command; two starts of a machine take two of them."""
    code = "import sys; sys.path[:0] = {!r}; import runs; print(*runs.SECONDS.values())"
    folders = [str(GPU), str(GPU.parent)]
    done = subprocess.run([sys.executable, "-P", "-c", code.format(folders)], capture_output=True, text=True)
    a, b, c, d = map(int, done.stdout.split())
    assert a + b + c < 560 and d < 540 and a + b + c + d <= 13 * 60
