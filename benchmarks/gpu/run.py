"""`make test-gpu`, `make bench-gpu`: the GPU kernels on a machine that has torch, triton and a GPU; vLLM is not needed.

Builds the package if it is not installed, checks every kernel family against the float32 reference, and only then times it:
decode against the same attention without the correction, against full contexts, torch SDPA, FlashInfer and xformers where
installed, and against the time to copy the bytes; what retiring costs; CUDA-graph replay against eager. Prints tables, writes
gpu.json and gpu.png to $OUT or benchmarks/results. `--interpret` runs all of it on tiny shapes in Triton's interpreter: its
figures say nothing about a GPU and the file says so.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # shape.py


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check only, time nothing (make test-gpu)")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    return parser.parse_args()


def build() -> None:
    """Put the package of this checkout under build/gpu and start again with it, unless one is installed."""
    if importlib.util.find_spec("momentkv_vllm"):
        return
    target = ROOT / "build" / "gpu"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    env = os.environ | {"MOMENTKV_BUILD_CPU": "0"}
    subprocess.run([*command, "--target", str(target), str(ROOT)], check=True, env=env)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONPATH": str(target)})


def output_folder() -> Path:
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"


def main() -> None:
    args = arguments()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    build()
    import check
    import machine
    import measure

    device = "cpu" if args.interpret else "cuda"
    header = machine.header(ROOT, args.interpret)
    print(json.dumps(header, indent=1))
    checks = check.run(device, tiny=args.interpret)
    print(f"{len(checks)} cases agree with the float32 reference, bit for bit the same twice")
    if args.check:
        return
    results = {"machine": header, "interpreted": args.interpret, "checks": checks}
    results |= measure.run(device, tiny=args.interpret)
    folder = output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written {folder / 'gpu.json'}")
    if importlib.util.find_spec("matplotlib"):
        import plot

        plot.save(results, folder / "gpu.png")
        print(f"written {folder / 'gpu.png'}")


if __name__ == "__main__":
    main()
