"""The runs of the kit (shared/docs/gpu.md, section 4): what each one does, in order of importance, and how a task is done.

A: right or wrong. B: decode. C: prefill. E: the CUDA C++ family. D: the engine (engine.py, with vLLM carried along).
"""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import check
import graph
import heads as heads_of_their_own
import measure
import plans
import prompt as prompt_runs
from cases import Shape
from kit import Task
from machine import Timer, copy_bandwidth
from momentkv_vllm.triton_kernels import tuning

SECONDS = {"A": 180, "B": 170, "C": 80, "E": 90, "D": 230}
"""Of a run, with what earlier ones of the same call have left: A, B, C and E end before a command is cut off at 600 s, in 15
minutes of device time that also start the machine."""
TASK_SECONDS = {"A": 100, "B": 40, "C": 50, "D": 220, "E": 80}
"""After which a task is given up, so that one that hangs costs no run."""
WORKERS = {"A": 10, "B": 1, "C": 1, "D": 1, "E": 1}
"""In A compilers take the time; elsewhere a timing must be alone on the GPU."""
STORES = ("int4", "model", "int8")
LAYERS, GRAINS = 32, (512, 256, 128, 32)


def tasks(run: str, tiny: bool) -> list[Task]:
    """All of a run's, the most important first: int4 in Triton is the default. tiny: what the interpreter gets through."""
    return {"A": checks, "B": decodes, "C": prefills, "D": engines, "E": natives}[run](tiny)


def checks(tiny: bool) -> list[Task]:
    family, grain = {"family": "triton"}, 32 if tiny else 512
    found: list[Task] = []
    for store in STORES[:2]:
        found += [{"what": "life", "store": store, **family}, {"what": "replay", "store": store, **family}]
        found += [{"what": "reads", "store": store, "grain": grain, **family}]
    kept = {"what": "stores", **family}
    found += [kept | {"store": "int4", "fed_back": True}, {"what": "heads", **family}, {"what": "plan"}]
    if not tiny:
        found += [{"what": "sanitize", **family}, {"what": "life", "store": "int8", **family}]
        found += [kept | {"store": "int8", "fed_back": True}, kept | {"store": "int4", "fed_back": False}]
    return found + [{"what": "check", "shape": i, **family} for i in range(len(_shapes(tiny)))]


def decodes(tiny: bool) -> list[Task]:
    family = {"family": "triton"}
    if tiny:
        one = [{"what": "copy"}, {"what": "context", "rows": 1, "tokens": 128, **family}]
        one += [{"what": "decode", "rows": 1, "slots": 64, "record": "zeroth", **family}]
        one += [
            {"what": "retire", "rows": 1, "slots": 96, **family},
            {"what": "rounding", "rows": 2, "layers": 2, **family},
        ]
        variant = {"what": "variant", "kernel": "decode", "rows": 1}
        one += [variant | {"number": n, "slots": s, "store": k} for n, s, k in ((0, 64, "model"), (11, 128, "int4"))]
        one += [{"what": "step", "store": s, "rows": 2, "layers": 2, **family} for s in STORES[:2]]
        return one + [{"what": "step", "store": "int4", "rows": 2, "layers": 2, "own": True, **family}]
    found: list[Task] = [{"what": "copy"}]

    def steps(rows: int, layers: int = LAYERS) -> list[Task]:
        return [{"what": "step", "store": s, "rows": rows, "layers": layers, **family} for s in STORES[:2]]

    def variants(store: str, rows: int) -> list[Task]:
        one = {"what": "variant", "kernel": "decode", "store": store, "rows": rows, "slots": 1024}
        return [one | {"number": n} for n in range(len(tuning.DECODE_VARIANTS))]

    def retires(rows: int) -> list[Task]:
        return [{"what": "retire", "rows": rows, "slots": 1024, **family}]

    def contexts(rows: int, tokens: int) -> list[Task]:
        return [{"what": "context", "rows": rows, "tokens": tokens, **family}]

    def kernels(rows: int, slots: int, record: str = "zeroth") -> list[Task]:
        return [{"what": "decode", "rows": rows, "slots": slots, "record": record, **family}]

    found += steps(32) + [{"what": "step", "store": "int4", "rows": 32, "layers": LAYERS, "own": True, **family}]
    found += contexts(32, 8192) + variants("int4", 32) + steps(8) + retires(32)
    found += [{"what": "rounding", "rows": 32, "layers": LAYERS, **family}]
    found += kernels(32, 1024) + kernels(8, 1024) + variants("model", 32) + contexts(8, 32768) + steps(128, 16)
    found += kernels(32, 4096) + variants("int4", 8) + retires(8) + contexts(1, 32768) + contexts(8, 131072)
    return found + kernels(32, 1024, "bfloat16") + kernels(1, 1024) + kernels(128, 1024) + variants("model", 8)


def prefills(tiny: bool) -> list[Task]:
    if tiny:
        return [{"what": "prefill", "family": "triton", "store": "int4", "grain": 32, "prompt": 200}]
    one = {"what": "prefill", "family": "triton"}
    found = [one | {"store": "int4", "grain": grain, "prompt": 8192} for grain in GRAINS]
    found.insert(1, found[0] | {"fed_back": True})
    found += [one | {"store": s, "grain": 512, "prompt": p} for s, p in (("model", 8192), ("int4", 32768))]
    chunk = {"what": "variant", "kernel": "chunk", "store": "model", "rows": 1, "slots": 1536}
    found += [chunk | {"number": n} for n in range(len(tuning.CHUNK_VARIANTS))]
    return found + [one | {"store": "model", "grain": grain, "prompt": 8192} for grain in GRAINS[1:]]


def natives(tiny: bool) -> list[Task]:
    """The CUDA C++ family, which knows no quantised stores."""
    if tiny:
        return []
    family = {"family": "cuda"}
    found = [{"what": "life", "store": "model", **family}, {"what": "sanitize", **family}]
    found += [{"what": "check", "shape": i, **family} for i in range(0, len(_shapes(tiny)), 4)]
    found += [{"what": "step", "store": "model", "rows": 32, "layers": LAYERS, **family}]
    for rows in (32, 8):
        found += [{"what": "decode", "rows": rows, "slots": 1024, "record": "zeroth", **family}]
        found += [{"what": "retire", "rows": rows, "slots": 1024, **family}]
    return found + [{"what": "check", "shape": i, **family} for i in range(len(_shapes(tiny))) if i % 4]


def engines(tiny: bool) -> list[Task]:
    """Each in a process of its own, as the engine's memory is."""
    if tiny:
        return [{"what": "engine", "arguments": ["--help"]}]
    common = ["--repeats", "1", "--contexts", "8192", "--batches"]
    return [{"what": "engine", "arguments": [*common, "32"]}, {"what": "engine", "arguments": [*common, "1", "8"]}]


def _shapes(tiny: bool) -> list[Shape]:
    return check.TINY if tiny else check.SHAPES


def do(task: Task, device: str) -> dict[str, Any]:
    """A task's result. Raises whatever goes wrong, AssertionError where an answer is not right."""
    tiny = device == "cpu"
    given = {k: v for k, v in task.items() if k not in ("what", "family")}
    if task["what"] == "engine":
        return _engine(**given)
    if "family" in task:
        given["family"] = _family(task["family"])
    return {"copy": _copy, "life": _life, "plan": _plan, "replay": _replay, "reads": _reads, "stores": _stores, "heads": _heads,
            "sanitize": _sanitize, "check": _check, "decode": _decode, "context": _context, "retire": _retire,
            "rounding": _rounding, "variant": _variant, "step": _step,
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


def _reads(device: str, tiny: bool, family, store: str, grain: int) -> dict[str, Any]:
    return prompt_runs.life(family, device, store, grain, _layer(tiny))


def _stores(device: str, tiny: bool, family, store: str, fed_back: bool) -> dict[str, Any]:
    return graph.stores(family, device, tiny, store, fed_back)


def _sanitize(device: str, tiny: bool, family) -> dict[str, Any]:
    """compute-sanitizer over the smallest checks."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]; import check; "
    code += f"[check.check(s, {family.name!r}, check.families()[{family.name!r}], 'cuda') for s in check.SANITIZED]"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, (done.stdout + done.stderr)[-600:]
    return {"family": family.name, "says": done.stdout.strip().splitlines()[-1]}


def _check(device: str, tiny: bool, family, shape: int) -> dict[str, Any]:
    return check.check(_shapes(tiny)[shape], family.name, family, device)


def _decode(device: str, tiny: bool, family, rows: int, slots: int, record: str) -> dict[str, Any]:
    shape = Shape(**_size(tiny), rows=rows, slots=slots, record=record)
    return measure.decode(family, _timer(device), _bandwidth(device), shape, device)


def _context(device: str, tiny: bool, family, rows: int, tokens: int) -> dict[str, Any]:
    return measure.context(
        family, _timer(device), tokens, Shape(**_size(tiny), rows=rows, slots=min(1024, tokens // 2)), device
    )


def _retire(device: str, tiny: bool, family, rows: int, slots: int) -> dict[str, Any]:
    return measure.retire(family, _timer(device), Shape(**_size(tiny), rows=rows, slots=slots), device)


def _rounding(device: str, tiny: bool, family, rows: int, layers: int) -> dict[str, Any]:
    return measure.rounding(family, _timer(device), rows, layers, device, tiny)


def _variant(device: str, tiny: bool, kernel: str, number: int, store: str, rows: int, slots: int) -> dict[str, Any]:
    variants, queries = {"decode": (tuning.DECODE_VARIANTS, 1), "chunk": (tuning.CHUNK_VARIANTS, 512)}[kernel]
    shape = Shape(**_size(tiny), rows=rows, slots=slots, queries=queries)
    return measure.variant(_timer(device), shape, variants[number], store, device, tiny)


def _step(device: str, tiny: bool, family, store: str, rows: int, layers: int, own: bool = False) -> dict[str, Any]:
    return measure.step(family, _timer(device), _bandwidth(device), store, rows, layers, device, tiny, own)


def _heads(device: str, tiny: bool, family) -> dict[str, Any]:
    return heads_of_their_own.life(family, device, tiny)


def _layer(tiny: bool) -> dict[str, int]:
    _, heads, groups, d, budget = graph.sizes_of(tiny)
    return {"heads": heads, "groups": groups, "d": d, "budget": budget}


def _prefill(
    device: str, tiny: bool, family, store: str, grain: int, prompt: int, fed_back: bool = False
) -> dict[str, Any]:
    return prompt_runs.timed(family, device, store, grain, prompt, _layer(tiny), fed_back)


def _engine(arguments: list[str]) -> dict[str, Any]:
    """engine.py in a process of its own; its figures are in gpu_engine_BATCHES.json."""
    command = [sys.executable, "-m", "gpu.engine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return {"arguments": arguments, "says": done.stdout[-3000:]}
