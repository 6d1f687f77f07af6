"""The GPU kit: `python3 benchmarks/gpu/run.py A B C E` answers all that needs no engine in one call of under 9 minutes.

A: kernels against the float32 reference, over whole lives, prompts and captured graphs; compute-sanitizer. B: a decode step, its
bytes' floor, variants, retiring. C: prompts by grain of events. E: the CUDA C++ family, which nvcc builds meanwhile. D: the
engine, with vLLM beside it (pack.py), in a call of its own.

A machine needs Python 3.10, torch with CUDA, and triton; this checkout is all that is carried. Runs go on in the order given,
the most important tasks first, and each ends at its time limit, to which comes what earlier ones have left. Every result is
appended to gpu.jsonl in $OUT (or benchmarks/results) when it is there; gpu_A.json and so on follow at a run's end.
`--interpret`: tiny shapes in Triton's interpreter, without a GPU; those figures say nothing about one, and the file says so.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILT, NATIVE = ROOT / "build" / "gpu", ROOT / "build" / "gpu-native"
sys.path.append(str(ROOT / "benchmarks"))  # shape.py
STARTED = "GPU_KIT_STARTED"
"""When the kit was started, by time.monotonic(), told to the process that goes on with what was installed."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", choices=["A", "B", "C", "D", "E"])
    parser.add_argument("--seconds", type=float, help="of each run, in place of its own limit")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--list", action="store_true", help="print the tasks and do none")
    return parser.parse_args()


def install(target: Path, cuda: bool) -> subprocess.Popen:
    """Begins to put the package of this checkout under `target`."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    env = {"MOMENTKV_BUILD_CPU": "0", "MOMENTKV_BUILD_CUDA": str(int(cuda)), "TORCH_CUDA_ARCH_LIST": "9.0a"}
    return subprocess.Popen([*command, "--target", str(target), str(ROOT)], env=os.environ | env | {"MAX_JOBS": "6"})


def with_package() -> None:
    """Goes on in a process that can import the package; of this checkout unless there is one."""
    os.environ.setdefault(STARTED, str(time.monotonic()))
    if importlib.util.find_spec("momentkv_vllm"):
        return
    if not (BUILT / "momentkv_vllm").exists() and install(BUILT, cuda=False).wait():
        raise SystemExit("pip could not install this checkout, see above")
    print(f"installed after {time.monotonic() - float(os.environ[STARTED]):.1f} s", flush=True)
    paths = [str(BUILT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


class Native:
    """The CUDA C++ extension, compiled beside the other runs."""

    def __init__(self, wanted: bool) -> None:
        known = importlib.util.find_spec("momentkv_vllm._cuda")
        self.process = install(NATIVE, cuda=True) if wanted and not known else None

    def wait(self, end: float) -> None:
        """Until `end` (of time.monotonic()); then it is where the package is."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
        for library in NATIVE.glob("momentkv_vllm/_cuda*.so"):
            shutil.copy(library, BUILT / "momentkv_vllm" / library.name)


def output_folder() -> Path:
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"


def main() -> None:
    args = arguments()
    if args.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # before triton is imported
    import look

    if STARTED not in os.environ:
        look.look()
    look.require(args.interpret)
    with_package()
    import kit
    import runs

    if args.list:
        for run in args.runs:
            print(run, *(json.dumps(task) for task in runs.tasks(run, args.interpret)), sep="\n")
        return
    native = Native("E" in args.runs and not args.interpret)
    folder = output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "gpu.jsonl"
    lines.unlink(missing_ok=True)
    header = look.header(ROOT, args.interpret)
    kit.append(lines, {"run": "", "machine": header})
    failed, end = 0, float(os.environ[STARTED])
    for run in args.runs:
        start = time.monotonic()
        end = end + runs.SECONDS[run] if args.seconds is None else start + args.seconds
        if run == "E":
            native.wait(end)
        given = {"interpreted": args.interpret, "task_seconds": runs.TASK_SECONDS[run]}
        found = kit.run(run, runs.tasks(run, args.interpret), runs.WORKERS[run], end, lines, given)
        found["seconds"] = round(time.monotonic() - start, 1)
        results = {"machine": header, "run": run, "interpreted": args.interpret, **found}
        (folder / f"gpu_{run}.json").write_text(json.dumps(results, indent=1) + "\n")
        show(run, found)
        failed += len(found["failed"])
        if run == "B" and found["done"] and importlib.util.find_spec("matplotlib"):
            import plot

            plot.save(results, folder / "gpu.png")
    sys.exit(1 if failed else 0)


def show(run: str, found: dict[str, Any]) -> None:
    """A table of each kind of result, then what failed, then what there was no time for."""
    from report import table

    kinds = list(dict.fromkeys(line["task"]["what"] for line in found["done"]))
    for kind in kinds:
        rows = [line["result"] for line in found["done"] if line["task"]["what"] == kind]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{run}: {kind}", table([columns, *([row.get(c, "") for c in columns] for row in rows)]), sep="\n")
    for line in found["failed"]:
        print(f"FAILED {json.dumps(line['task'])}: {line['error']}")
    for task in found["left"]:
        print(f"no time for {json.dumps(task)}")
    counts = {name: len(found[name]) for name in ("done", "failed", "left")}
    print(f"\n{run}: {counts}, {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
