"""`run.py A`, B, C, D or several: the GPU kit. One command a run, which builds, checks, times, prints a table and writes JSON.

A: every kernel family against the float32 reference, device plan against host plan, graph replay against eager, memory checks.
B: decode, its variants, retiring, a step of 32 layers. C: prefill by grain of events. D: the engine, with vLLM beside it.
Needs torch, triton and a GPU; D also vLLM (pack.py). A run ends at its time limit, whatever is left to do, and says what that is;
gpu_A.json and so on go to $OUT or benchmarks/results. `--interpret`: tiny shapes in Triton's interpreter, without a GPU; those
figures say nothing about one, and the file says so.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # shape.py


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", choices=["A", "B", "C", "D"])
    parser.add_argument("--seconds", type=float, help="of each run, in place of its own limit")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--list", action="store_true", help="print the tasks and do none")
    return parser.parse_args()


def build() -> None:
    """Put the package of this checkout under build/gpu, with the extension where nvcc is, and start again with it."""
    if importlib.util.find_spec("momentkv_vllm"):
        return
    target = ROOT / "build" / "gpu"
    if not (target / "momentkv_vllm").exists():
        start = time.monotonic()
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
        env = {"MOMENTKV_BUILD_CPU": "0", "TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": "16"} | os.environ
        subprocess.run([*command, "--target", str(target), str(ROOT)], check=True, env=env)
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def output_folder() -> Path:
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"


def main() -> None:
    args = arguments()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    build()
    import kit
    import machine
    import runs

    folder = output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if args.list:
        for run in args.runs:
            print(run, *(json.dumps(task) for task in runs.tasks(run, args.interpret)), sep="\n")
        return
    header = machine.header(ROOT, args.interpret)
    print(json.dumps(header, indent=1), flush=True)
    failed = 0
    for run in args.runs:
        start, limit = time.monotonic(), args.seconds or runs.SECONDS[run]
        found = kit.run(runs.tasks(run, args.interpret), runs.WORKERS[run], limit, args.interpret)
        found["seconds"] = round(time.monotonic() - start, 1)
        results = {"machine": header, "run": run, "interpreted": args.interpret, **found}
        path = folder / f"gpu_{run}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        show(run, found)
        print(f"written {path}", flush=True)
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
    print(f"\n{run}: {counts}, {found['seconds']} s")


if __name__ == "__main__":
    main()
