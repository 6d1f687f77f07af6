"""A real `vllm serve` in a child process, on a free loopback port."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 480


# Below the ports that Linux gives to clients' sockets: a server listens ten seconds after its port was chosen, and one of those
# may be somebody's by then.
PORTS = range(15_000, 32_768)


def free_port() -> int:
    """A port of 127.0.0.1 that is free now. By the system's chance: engines in a process seed Python's own, all alike."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


class Server:
    """Started in the constructor; `stop` ends exactly the processes it started.

    binding: cores of the workers as vLLM writes them, "0|1" for two workers; None: as in this environment, else vLLM chooses.
    environment: further variables of the server.
    executable: vLLM's command, if not this environment's.
    """

    def __init__(
        self, model: Path, *options: str, folder: Path, name: str = "tiny", threads: int = 1, binding: str | None = None,
        environment: dict[str, str] | None = None, executable: Path | None = None,
    ) -> None:  # fmt: skip
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        command = [
            str(executable or Path(sys.executable).parent / "vllm"),
            "serve",
            str(model),
            "--served-model-name",
            name,
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", *options]
        # Not the repository root: a top-level folder `triton_kernels` on sys.path would confuse vLLM.
        settings = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") and k != "PYTHONPATH"}
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}
        settings |= environment or {}
        binding = binding or os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
        if binding:
            settings["VLLM_CPU_OMP_THREADS_BIND"] = binding
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=settings, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> "Server":
        """Until /health answers. Raises RuntimeError with the log's end if the server exits first."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve exited with {self.process.returncode}:\n{self.log[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"vllm serve was not ready after {START_SECONDS} s:\n{self.log[-3000:]}")

    def samples(self, prefix: str = "momentkv:") -> list[str]:
        """Lines of /metrics that begin with `prefix`, one a metric and label set; ours, unless told otherwise."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return [line for line in lines if line.startswith(prefix) and not line.startswith("#")]

    def metrics(self, prefix: str = "momentkv:") -> dict[str, float]:
        """Samples by name, summed over labels."""
        found: dict[str, float] = {}
        for line in self.samples(prefix):
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0.0) + value
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # An API server that ends while its engine starts leaves engine and workers behind, in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
