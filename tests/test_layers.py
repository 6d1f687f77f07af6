"""Imports go down the layers only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "momentkv_vllm"
LAYERS = [
    {"moments", "model_layers", "versions", "metrics"},
    {"policies"},
    {"config"},
    {"page_schedule", "page_layout", "records", "testing"},
    {"triton_kernels"},
    {"kernels"},
    {"block_manager"},
    {"attention"},
    {"vllm_seams"},
    {"plugin", "cli", "doctor", "endpoint"},
]
"""`attention` may use `block_manager.spec`, the record both sides share, and nothing else of it."""


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom | ast.Import)]
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    return names | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imports(path):
        if name.startswith("momentkv_vllm."):
            assert layer(name.split(".")[1]) <= layer(parts[0]), f"{path.name} imports {name}"
            if parts[0] == "attention" and name.split(".")[1] == "block_manager":
                assert name == "momentkv_vllm.block_manager.spec"
        if layer(parts[0]) <= layer("kernels"):
            assert name.split(".")[0] != "vllm", f"{path.name} must not know vLLM"
