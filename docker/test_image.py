"""Serves from the CPU image that docker/build_cpu.sh built (buildah, chroot isolation) and asks it over the loopback.

python docker/test_image.py        needs root and buildah; IMAGE_DIR as for build_cpu.sh
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

MODEL = Path(__file__).parent.parent / "benchmarks/test_model/checkpoint"
IMAGE_DIR = Path(os.environ.get("IMAGE_DIR", "/var/tmp/momentkv-image"))
BUILDAH = ["buildah", "--root", f"{IMAGE_DIR}/storage", "--runroot", f"{IMAGE_DIR}/run", "--storage-driver", "vfs"]
URL = "http://127.0.0.1:8000"
OPTIONS = ["/models/test", "--host", "127.0.0.1", "--kv-eviction", "momentkv", "--kv-budget", "256"]
START_SECONDS = 600


def buildah(*words: str) -> str:
    return subprocess.run([*BUILDAH, *words], check=True, capture_output=True, text=True).stdout


def get(path: str, body: dict | None = None) -> str:
    """Text of the answer; raises urllib.error.URLError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def wait_ready(server: subprocess.Popen, check: str) -> float:
    """Seconds until the image's own health check passes; the check itself is run in this process's Python."""
    start = time.monotonic()
    while time.monotonic() < start + START_SECONDS:
        if server.poll() is not None:
            sys.exit(f"the server exited with {server.returncode}")
        if subprocess.run([sys.executable, "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
            return time.monotonic() - start
        time.sleep(1)
    sys.exit(f"not ready after {START_SECONDS} s")


def ask() -> dict:
    """One short chat and one prompt of three budgets; what the metrics say afterwards."""
    model = json.loads(get("/v1/models"))["data"][0]["id"]
    chat = {
        "model": model,
        "messages": [{"role": "user", "content": "t001 t002 t003"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    words = " ".join(f"t{n % 128:03}" for n in range(800))
    long = {"model": model, "prompt": words, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    answers = [json.loads(get("/v1/chat/completions", chat)), json.loads(get("/v1/completions", long))]
    metrics: dict[str, float] = {}
    for line in get("/metrics").splitlines():
        if line.startswith("momentkv:"):
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            metrics[name] = metrics.get(name, 0.0) + value
    assert answers[0]["usage"]["completion_tokens"] >= 1 and answers[1]["usage"]["completion_tokens"] == 32
    assert metrics["momentkv:retired_pages_total"] > 0 and metrics["momentkv:evicted_tokens_total"] > 0, metrics
    assert metrics["momentkv:live_pages"] == 0, metrics
    return metrics


def main() -> None:
    image = json.loads(buildah("inspect", "--type", "image", "localhost/momentkv:cpu"))["Docker"]["config"]
    check = image["Healthcheck"]["Test"][-1]
    container = buildah("from", "localhost/momentkv:cpu").strip()
    run = [*BUILDAH, "run", "--isolation", "chroot", "--volume", f"{MODEL}:/models/test:ro"]
    run += ["--env", "VLLM_CPU_KVCACHE_SPACE=1", "--env", "OMP_NUM_THREADS=1", container, "--"]
    try:
        user = subprocess.run([*run, "id", "-u"], check=True, capture_output=True, text=True).stdout.strip()
        assert user == image["User"] != "0", (user, image["User"])
        print(f"user {user}, entry point {shlex.join(image['Entrypoint'])}", flush=True)
        server = subprocess.Popen([*run, *image["Entrypoint"], *OPTIONS], start_new_session=True)
        try:
            print(f"healthy after {wait_ready(server, check):.0f} s", flush=True)
            print("ok", ask())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    finally:
        buildah("rm", container)


if __name__ == "__main__":
    main()
