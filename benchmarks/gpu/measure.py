"""The timings of `make bench-gpu`, each as a table's rows; ratios against a baseline of the same run."""

from typing import Any

import baselines
import graph
from cases import Case, Shape
from check import POLICY, families
from machine import Timer, copy_bandwidth
from shape import SINKS

from momentkv_vllm.page_schedule import DEFAULT_RETIRE_SHARE

ROWS, BUDGETS, CONTEXTS = (1, 8, 32, 128), (512, 1024, 2048, 4096), (8192, 32768, 131072)
SPLITS = (128, 256, 512)
MOST_BYTES = 24 << 30
"""Of KV that a case may hold."""


def decode(family, timer: Timer, bandwidth: float, shape: Shape, device: str) -> dict[str, Any]:
    """Corrected decode attention against the same without correction, other kernels, and the time to copy its bytes."""
    case = Case(shape, device)
    plain, corrected = timer(lambda: case.attend(family, False)), timer(lambda: case.attend(family, True))
    row = {
        "shape": shape.label,
        "rows": shape.rows,
        "slots": shape.slots,
        "head_dim": shape.head_dim,
        "corrected_us": corrected * 1e6,
        "correction_to_plain": corrected / plain,
        "floor_to_corrected": (shape.kv_bytes + shape.record_bytes) / bandwidth / corrected,
    }
    return row | {f"{name}_us": us for name, us in others(case, timer).items()}


def others(case: Case, timer: Timer) -> dict[str, float]:
    """Microseconds of the baselines; one that fails on this machine is left out, with a line."""
    times = {}
    for name, make in baselines.available().items():
        try:
            times[name] = timer(make(case)) * 1e6
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            print(f"{name} left out for {case.shape.label}: {str(error).splitlines()[0]}")
    return times


def context(family, timer: Timer, rows: int, tokens: int, kept: Shape, device: str) -> dict[str, Any]:
    """Full attention over a context against the corrected budget; the same kernel, and the others."""
    full, kept_case = Case(Shape(rows=rows, slots=tokens, **_small(kept)), device), Case(kept, device)
    ours = timer(lambda: kept_case.attend(family, True))
    whole = {"same_kernel": timer(lambda: full.attend(family, False)) * 1e6} | others(full, timer)
    bound = full.shape.kv_bytes / (kept.kv_bytes + kept.record_bytes)
    best = min(whole.values()) / 1e6
    row = {"rows": rows, "context": tokens, "budget_us": ours * 1e6, "speedup_over_best": best / ours}
    return row | {"bytes_bound": bound} | {f"full_{name}_us": us for name, us in whole.items()}


def retire(family, timer: Timer, shape: Shape, device: str) -> dict[str, Any]:
    """An event of every row, amortised over the tokens between events; and the launch when no row is due."""
    case = Case(shape, device)
    pages = max(1, shape.slots // DEFAULT_RETIRE_SHARE // shape.page_size)
    due, idle = case.retire_work(pages), case.retire_work(pages, due=False)

    def consolidate(work):
        return lambda: family.consolidate(case.cache, case.mass, work, POLICY, SINKS, case.scale)

    attend = timer(lambda: case.attend(family, True))
    event, nothing = timer(consolidate(due)), timer(consolidate(idle))
    tokens = pages * shape.page_size
    return {
        "budget": shape.slots,
        "rows": shape.rows,
        "retire_tokens": tokens,
        "event_us": event * 1e6,
        "idle_us": nothing * 1e6,
        "share_of_attend": (event / tokens + nothing * (tokens - 1) / tokens) / attend,
    }


def splits(timer: Timer, shape: Shape, device: str) -> list[dict[str, Any]]:
    """Tokens of a split-KV part of the Triton kernel: which constant is right."""
    from momentkv_vllm.triton_kernels.attend_decode import attend_decode

    case = Case(shape, device)

    def attend(split):
        return lambda: attend_decode(case.cache, case.query, case.output, None, case.work, case.scale, True, split)

    return [{"rows": shape.rows, "split": split, "us": timer(attend(split)) * 1e6} for split in SPLITS]


def run(device: str, tiny: bool) -> dict[str, Any]:
    timer = Timer(device)
    bandwidth = copy_bandwidth(timer, device)
    size = {"kv_heads": 1, "head_dim": 32, "groups": 2} if tiny else {}
    rows, budgets, contexts = ((1,), (64,), (128,)) if tiny else (ROWS, BUDGETS, CONTEXTS)
    dims = (32,) if tiny else (64, 128)
    found: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "families": {}}
    for name, family in families(device).items():
        decodes = [
            decode(family, timer, bandwidth, Shape(**size | {"head_dim": d}, rows=r, slots=b, record=record), device)
            for d in dims
            for r in rows
            for b in budgets
            for record in ("bfloat16", "zeroth")
        ]
        wide = [
            context(family, timer, r, c, Shape(**size, rows=r, slots=min(1024, c // 2)), device)
            for c in contexts
            for r in rows
            if Shape(**size, rows=r, slots=c).kv_bytes <= MOST_BYTES
        ]
        retired = [
            retire(family, timer, Shape(**size, rows=r, slots=b, record="zeroth"), device)
            for b in budgets
            for r in rows
        ]
        parts = {"decode": decodes, "context": wide, "retire": retired, "replay": graph.run(family, device, tiny)}
        for part in ("decode", "context", "retire"):
            print(f"\n{name}: {part}\n{table(parts[part])}")
        print(f"\n{name}: replay {parts['replay']}")
        found["families"][name] = parts
    found["splits"] = [s for r in rows for s in splits(timer, Shape(**size, rows=r, slots=budgets[-1]), device)]
    print(f"\nsplits\n{table(found['splits'])}\ncopy {bandwidth / 1e9:.0f} GB/s")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [columns] + [[_cell(row.get(c, "")) for c in columns] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in text]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _small(shape: Shape) -> dict[str, Any]:
    return {k: getattr(shape, k) for k in ("head_dim", "kv_heads", "groups", "page_size", "dtype")}
