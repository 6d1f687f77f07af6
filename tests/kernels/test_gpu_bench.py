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
    assert kinds["A"] == {"life", "plan", "replay", "check"} and kinds["C"] == {"prefill"}
    assert kinds["B"] == {"copy", "decode", "context", "retire", "variant", "step"}
    for line in found["A"]["done"]:
        result = line["result"]
        assert result.get("worst_relative_difference", 0) < 2**-6 and result.get("retired_pages", 1) > 0, result
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "A: life" in done.stdout and "| triton |" in done.stdout


@pytest.mark.slow
def test_a_wrong_kernel_fails_and_times_nothing(tmp_path):
    """The gate in front of every figure: one number off, in run A and in run B."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('TRITON_INTERPRET') == '1':\n"
        "    from momentkv_vllm.kernels import triton\n"
        "    attend, observing = triton.Triton.attend, triton.Triton.attend_and_observe\n"
        "    def wrong(self, cache, query, output, *rest):\n"
        "        attend(self, cache, query, output, *rest)\n"
        "        output[-1, -1, 3] += 1.0\n"
        "    def also_wrong(self, cache, observed, query, output, *rest):\n"
        "        observing(self, cache, observed, query, output, *rest)\n"
        "        output[-1, -1, 3] += 1.0\n"
        "    triton.Triton.attend, triton.Triton.attend_and_observe = wrong, also_wrong\n"
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
    while any(map(alive, found["done"])):
        assert time.monotonic() - start < kit.GRACE + 12, "a signal takes a moment to arrive, not ten seconds"
        time.sleep(0.1)


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
