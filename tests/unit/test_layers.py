"""Imports go down the layers only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "momentkv_vllm"
LAYERS = [
    {
        "refuse",
        "budget_classes",
        "environment",
        "moments",
        "softcap",
        "event_counts",
        "model_layers",
        "versions",
        "metrics",
        "state_file",
        "model_identity",
        "_cpu",
        "_cuda",
    },
    {"policies"},
    {"config"},
    {
        "page_schedule",
        "page_blocks",
        "page_layout",
        "rotation",
        "key_rounding",
        "packed_store",
        "key_centres",
        "fp8",
        "head_budgets",
        "records",
        "testing",
    },
    {"triton_kernels"},
    {"kernels"},
    {"kv_spec"},
    {"block_manager", "attention"},
    {"vllm_seams"},
    {"calibrate"},
    {"plugin", "cli", "doctor", "endpoint", "state_routes", "state_client"},
]
"""`attention` (worker) and `block_manager` (scheduler) never import each other: what both need is in `kv_spec` or below."""


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    """Modules that a file names in imports, the late ones and those for type checkers included."""
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
            assert {parts[0], name.split(".")[1]} != {"attention", "block_manager"}, f"{path.name} imports {name}"
        if layer(parts[0]) < layer("kv_spec"):
            assert name.split(".")[0] != "vllm", f"{path.name} must not know vLLM"


def modules_of(path: Path) -> set[str]:
    """Our modules that a file imports; `from package import module` names the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_itself_over_others():
    names = {
        p: "momentkv_vllm." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")
    }
    graph = {name.removesuffix(".__init__"): modules_of(path) for path, name in names.items()}
    graph = {name: (found & set(graph)) - {name} for name, found in graph.items()}
    while leaves := {name for name, found in graph.items() if not found & set(graph)}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert not graph, f"import circles among {sorted(graph)}"


def test_no_function_is_longer_than_fifty_lines():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 50, f"{path.name}: {node.name} has {lines} lines"


def test_the_hot_path_is_on_one_screen():
    """What a layer does with a step's tokens: store, forward, attend, observe, one after the other in layer.py."""
    (layer,) = (n for n in ast.parse((PACKAGE / "attention/layer.py").read_text()).body if isinstance(n, ast.ClassDef))
    methods = [n for n in layer.body if isinstance(n, ast.FunctionDef)]
    names = [n.name for n in methods]
    first = names.index("do_kv_cache_update")
    assert names[first : first + 4] == ["do_kv_cache_update", "forward", "_attend", "_observe"]
    assert methods[first + 3].end_lineno - methods[first].lineno + 1 <= 60
