"""Every MOMENTKV_ variable of the environment. Settings are options of `vllm serve`; these are what cannot be one."""

import os
import re
from dataclasses import dataclass

from momentkv_vllm.refuse import refuse

PREFIX = "MOMENTKV_"


@dataclass(frozen=True)
class Variable:
    """A variable that holds a word or a path.

    values: what it may hold, for the table in docs/operations.md; default: what counts when it is unset or empty.
    readers: who reads it, and when. Only those of "the package" read it through this file.
    """

    name: str
    values: str
    default: str
    readers: str
    meaning: str

    def get(self) -> str:
        return os.environ.get(self.name) or self.default

    def set(self, value: str) -> None:
        """For this process and those that it starts."""
        os.environ[self.name] = value


class Switch(Variable):
    """A variable that holds 0 or 1."""

    def is_on(self) -> bool:
        """Raises ValueError for anything else: "true" must not mean no."""
        value = self.get()
        if value not in ("0", "1"):
            refuse(f"{self.name}={value!r} is not 0 or 1", "set one of them", "unset it")
        return value == "1"


ALLOW_UNTESTED_VLLM = Switch(
    "MOMENTKV_ALLOW_UNTESTED_VLLM",
    "0, 1",
    "0",
    "the package, at start-up",
    "serve with a vLLM that was not tested",
)
ALLOW_UNTESTED_GPU = Switch(
    "MOMENTKV_ALLOW_UNTESTED_GPU",
    "0, 1",
    "0",
    "the package, at start-up",
    "serve on CUDA, which has not run on a GPU yet",
)
METRICS_DIR = Variable(
    "MOMENTKV_METRICS_DIR",
    "a folder",
    "",
    "the package",
    "where our metrics pass between processes; the server sets it",
)
CPU_ISA = Variable(
    "MOMENTKV_CPU_ISA",
    "amx, avx512vnni, avx512, avx2, generic",
    "the best of this CPU",
    "csrc/cpu, at the first kernel",
    "instruction set",
)
BUILD_CPU = Variable("MOMENTKV_BUILD_CPU", "0, 1", "1", "setup.py", "0 leaves the C++ kernels out")
BUILD_CUDA = Variable(
    "MOMENTKV_BUILD_CUDA", "0, 1, auto", "auto", "setup.py", "1 insists on the CUDA kernels, 0 leaves them out"
)
SANITIZE = Variable("MOMENTKV_SANITIZE", "0, 1", "0", "setup.py", "1 builds csrc/cpu with AddressSanitizer and UBSan")
EMULATE_REVERSE = Variable(
    "MOMENTKV_EMULATE_REVERSE",
    "set, unset",
    "unset",
    "tests/kernels/test_cuda.py",
    "the CUDA emulator runs threads backwards",
)

VARIABLES = (
    ALLOW_UNTESTED_VLLM, ALLOW_UNTESTED_GPU, METRICS_DIR, CPU_ISA, BUILD_CPU, BUILD_CUDA, SANITIZE, EMULATE_REVERSE
)  # fmt: skip

_OF_A_SERVICE = re.compile(PREFIX + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\w+)?)")
"""Kubernetes tells every container of a service named "momentkv" (docker/kubernetes.yaml) by such variables."""


def unknown_variables() -> list[str]:
    """Names in the environment that look like ours and are not: a typing mistake would be silent."""
    known = {v.name for v in VARIABLES}
    ours = (name for name in os.environ if name.startswith(PREFIX) and name not in known)
    return sorted(name for name in ours if not _OF_A_SERVICE.fullmatch(name))
