"""The runs of the kit (shared/docs/gpu.md, section 4): what each one does, in order of importance, and how a task is done.

A: right or wrong. B: decode. C: prefill. D: the engine (engine.py, with vLLM carried along).
"""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import check
import graph
import measure
import plans
from cases import Shape
from kit import Task
from machine import Timer, copy_bandwidth
from momentkv_vllm.triton_kernels import tuning

SECONDS = {"A": 270, "B": 200, "C": 70, "D": 240}
"""Of a run: 15 minutes of device time are lent in all, starts included, 10 minutes a command."""
WORKERS = {"A": 8, "B": 1, "C": 1, "D": 1}
"""In A compilers take the time; elsewhere a timing must be alone on the GPU."""
FAMILIES, STORES = ("triton", "cuda"), ("int4", "model", "int8")
ROWS, BUDGETS, GRAINS = (32, 8, 128, 1), (1024, 4096), (512, 256, 128, 32)


def tasks(run: str, tiny: bool) -> list[Task]:
    """All of a run's, the most important first. tiny: what Triton's interpreter gets through."""
    made = {"A": checks, "B": decodes, "C": prefills, "D": engines}[run](tiny)
    return [task for task in made if not tiny or task.get("family", "triton") == "triton"]


def checks(tiny: bool) -> list[Task]:
    stores = ("int4", "model") if tiny else STORES
    found = [{"what": "life", "family": "triton", "store": store} for store in stores]
    found += [{"what": "plan"}, {"what": "life", "family": "cuda", "store": "model"}]
    found += [{"what": "replay", "family": "triton", "store": store} for store in stores[:2]]
    found += [{"what": "sanitize", "family": family} for family in FAMILIES if not tiny]
    shapes = check.TINY if tiny else check.SHAPES
    return found + [{"what": "check", "family": f, "shape": i} for i in range(len(shapes)) for f in FAMILIES]


def decodes(tiny: bool) -> list[Task]:
    if tiny:
        one = [{"what": "decode", "family": "triton", "rows": 1, "slots": 64, "record": "zeroth"}]
        one += [{"what": "context", "family": "triton", "rows": 1, "tokens": 128}, {"what": "copy"}]
        one += [{"what": "retire", "family": "triton", "rows": 1, "slots": 96}]
        one += [{"what": "variant", "kernel": "decode", "number": n, "rows": 1, "slots": 64} for n in (0, 11)]
        return one + [{"what": "step", "family": "triton", "store": "model", "rows": 2}]
    found: list[Task] = [{"what": "copy"}]
    found += [{"what": "step", "family": "triton", "store": s, "rows": r} for r in (32, 8) for s in ("int4", "model")]
    for rows in ROWS:
        for slots in BUDGETS:
            here = {"rows": rows, "slots": slots}
            found += [{"what": "decode", "family": f, "record": "zeroth", **here} for f in FAMILIES]
            found += [
                {"what": "variant", "kernel": "decode", "number": n, **here} for n in range(12) if rows in (8, 32)
            ]
        found += [{"what": "retire", "family": f, "rows": rows, "slots": 1024} for f in FAMILIES]
        found += [{"what": "context", "family": "triton", "rows": rows, "tokens": 8192}]
    found += [{"what": "step", "family": "cuda", "store": "model", "rows": 32}]
    found += [{"what": "decode", "family": f, "record": "bfloat16", "rows": 32, "slots": 1024} for f in FAMILIES]
    return found + [
        {"what": "context", "family": "triton", "rows": r, "tokens": t} for t in (32768, 131072) for r in (1, 8)
    ]


def prefills(tiny: bool) -> list[Task]:
    if tiny:
        return [{"what": "prefill", "family": "triton", "grain": 32, "prompt": 128}]
    found = [
        {"what": "prefill", "family": f, "grain": g, "prompt": p}
        for p in (8192, 32768)
        for g in GRAINS
        for f in FAMILIES
    ]
    chunk = {"what": "variant", "kernel": "chunk", "rows": 1, "slots": 1536}
    return found[:8] + [chunk | {"number": n} for n in range(8)] + found[8:]


def engines(tiny: bool) -> list[Task]:
    """Each in a process of its own, as the engine's memory is."""
    if tiny:
        return [{"what": "engine", "arguments": ["--help"]}]
    common = ["--contexts", "8192", "--batches"]
    return [{"what": "engine", "arguments": [*common, "32"]}, {"what": "engine", "arguments": [*common, "1", "8"]}]


def do(task: Task, device: str) -> dict[str, Any]:
    """A task's result. Raises whatever goes wrong, AssertionError where an answer is not right."""
    tiny = device == "cpu"
    given = {k: v for k, v in task.items() if k not in ("what", "family")}
    if task["what"] == "engine":
        return _engine(**given)
    if "family" in task:
        given["family"] = _family(task["family"])
    return {"copy": _copy, "life": _life, "plan": _plan, "replay": _replay, "sanitize": _sanitize, "check": _check,
            "decode": _decode, "context": _context, "retire": _retire, "variant": _variant, "step": _step,
            "prefill": _prefill}[task["what"]](device=device, tiny=tiny, **given)  # fmt: skip


def _family(name: str):

    found = check.families()
    if name not in found:
        raise LookupError(f"the family {name} does not work here: {check.named(name).objections()}")
    return found[name]


@cache
def _timer(device: str) -> Timer:

    return Timer(device)


@cache
def _bandwidth(device: str) -> float:
    return copy_bandwidth(_timer(device), device)


def _size(tiny: bool) -> dict[str, int]:
    return {"kv_heads": 1, "head_dim": 32, "groups": 2} if tiny else {"kv_heads": 8}


def _copy(device: str, tiny: bool) -> dict[str, Any]:
    return {"copy_bytes_per_second": _bandwidth(device)}


def _life(device: str, tiny: bool, family, store: str) -> dict[str, Any]:
    return graph.life(family, device, tiny, store)


def _plan(device: str, tiny: bool) -> dict[str, Any]:
    return plans.compare(device)


def _replay(device: str, tiny: bool, family, store: str) -> dict[str, Any]:
    return graph.replay(family, device, tiny, store)


def _sanitize(device: str, tiny: bool, family) -> dict[str, Any]:
    """compute-sanitizer over the smallest checks."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]; import check; "
    code += f"[check.check(s, {family.name!r}, check.families()[{family.name!r}], 'cuda') for s in check.SANITIZED]"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, (done.stdout + done.stderr)[-600:]
    return {"family": family.name, "says": done.stdout.strip().splitlines()[-1]}


def _check(device: str, tiny: bool, family, shape: int) -> dict[str, Any]:
    return check.check((check.TINY if tiny else check.SHAPES)[shape], family.name, family, device)


def _decode(device: str, tiny: bool, family, rows: int, slots: int, record: str) -> dict[str, Any]:
    shape = Shape(**_size(tiny), rows=rows, slots=slots, record=record)
    return measure.decode(family, _timer(device), _bandwidth(device), shape, device)


def _context(device: str, tiny: bool, family, rows: int, tokens: int) -> dict[str, Any]:
    return measure.context(
        family, _timer(device), tokens, Shape(**_size(tiny), rows=rows, slots=min(1024, tokens // 2)), device
    )


def _retire(device: str, tiny: bool, family, rows: int, slots: int) -> dict[str, Any]:
    return measure.retire(family, _timer(device), Shape(**_size(tiny), rows=rows, slots=slots), device)


def _variant(device: str, tiny: bool, kernel: str, number: int, rows: int, slots: int) -> dict[str, Any]:
    variants, queries = {"decode": (tuning.DECODE_VARIANTS, 1), "chunk": (tuning.CHUNK_VARIANTS, 512)}[kernel]
    shape = Shape(**_size(tiny), rows=rows, slots=slots, queries=queries)
    return measure.variant(_timer(device), shape, variants[number], device)


def _step(device: str, tiny: bool, family, store: str, rows: int) -> dict[str, Any]:
    return measure.step(family, _timer(device), store, rows, device, tiny)


def _prefill(device: str, tiny: bool, family, grain: int, prompt: int) -> dict[str, Any]:
    return measure.prefill(family, _timer(device), grain, prompt, min(1024, prompt // 2), device, _size(tiny))


def _engine(arguments: list[str]) -> dict[str, Any]:
    """engine.py in a process of its own; its figures are in gpu_engine.json."""
    command = [sys.executable, "-m", "gpu.engine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return {"arguments": arguments, "says": done.stdout[-3000:]}
