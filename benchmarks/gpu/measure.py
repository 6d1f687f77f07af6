"""The timings of runs B and C, each a row of a table; ratios against a baseline of the same worker."""

from typing import Any

import baselines
import graph
from cases import Case, Shape
from check import POLICY, ROUNDING, close, reference
from machine import Timer
from shape import SINKS

from momentkv_vllm.kernels.layer_table import LayerTable
from momentkv_vllm.kernels.worklists import LayersOf
from momentkv_vllm.page_schedule import DEFAULT_RETIRE_SHARE

LAYERS = 32


def checked(family, case: Case, label: str) -> None:
    """No figure without a right answer: corrected attention against the float32 reference."""
    case.attend(reference, True)
    want = case.output.clone()
    case.output.fill_(float("nan"))
    case.attend(family, True)
    close(case.output, want, ROUNDING[case.shape.dtype], label)


def decode(family, timer: Timer, bandwidth: float, shape: Shape, device: str) -> dict[str, Any]:
    """Corrected decode attention against the same without correction, other kernels, and the time to copy its bytes."""
    case = Case(shape, device)
    checked(family, case, f"{family.name}, {shape.label}")
    plain, corrected = timer(lambda: case.attend(family, False)), timer(lambda: case.attend(family, True))
    row = {"family": family.name, "rows": shape.rows, "slots": shape.slots, "head_dim": shape.head_dim}
    row |= {"record": shape.record, "corrected_us": corrected * 1e6, "correction_to_plain": corrected / plain}
    row["floor_to_corrected"] = (shape.kv_bytes + shape.record_bytes) / bandwidth / corrected
    return row | {f"{name}_us": us for name, us in others(case, timer).items()}


def others(case: Case, timer: Timer) -> dict[str, float]:
    """Microseconds of the baselines; one that fails on this machine is left out, with a line."""
    times = {}
    for name, make in baselines.available().items():
        try:
            times[name] = timer(make(case)) * 1e6
        except (RuntimeError, NotImplementedError, ValueError, ImportError, TypeError) as error:
            print(f"{name} left out for {case.shape.label}: {str(error).splitlines()[0]}")
    return times


def context(family, timer: Timer, tokens: int, kept: Shape, device: str) -> dict[str, Any]:
    """Full attention over a context against the corrected budget; the same kernel, and the others."""
    small = {k: getattr(kept, k) for k in ("head_dim", "kv_heads", "groups", "page_size", "dtype")}
    full, kept_case = Case(Shape(rows=kept.rows, slots=tokens, **small), device), Case(kept, device)
    checked(family, kept_case, f"{family.name}, {kept.label}")
    ours = timer(lambda: kept_case.attend(family, True))
    whole = {"same_kernel": timer(lambda: full.attend(family, False)) * 1e6} | others(full, timer)
    row = {"family": family.name, "rows": kept.rows, "context": tokens, "budget_us": ours * 1e6}
    row |= {"speedup_over_best": min(whole.values()) / 1e6 / ours}
    row["bytes_bound"] = full.shape.kv_bytes / (kept.kv_bytes + kept.record_bytes)
    return row | {f"full_{name}_us": us for name, us in whole.items()}


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
    row = {"family": family.name, "budget": shape.slots, "rows": shape.rows, "retire_tokens": tokens}
    row |= {"event_us": event * 1e6, "idle_us": nothing * 1e6, "attend_us": attend * 1e6}
    return row | {"share_of_attend": (event / tokens + nothing * (tokens - 1) / tokens) / attend}


def variant(timer: Timer, shape: Shape, tuning, device: str) -> dict[str, Any]:
    """A declared variant of the Triton kernels (triton_kernels/tuning.py)."""
    from momentkv_vllm.triton_kernels.attend_chunk import attend_chunk
    from momentkv_vllm.triton_kernels.attend_decode import attend_decode

    case = Case(shape, device)
    attend, more = (attend_decode, ()) if shape.queries == 1 else (attend_chunk, (shape.queries,))
    given = case.cache, case.query, case.output, None, case.work, case.scale, True, *more, tuning
    case.attend(reference, True)
    want = case.output.clone()
    attend(*given)
    close(case.output, want, ROUNDING[shape.dtype], f"{tuning}")
    row = {"queries": shape.queries, "rows": shape.rows, "slots": shape.slots, **tuning._asdict()}
    return row | {"us": timer(lambda: attend(*given)) * 1e6}


def step(family, timer: Timer, store: str, rows: int, device: str, tiny: bool) -> dict[str, Any]:
    """A step's attention of LAYERS layers in one graph: write, attend, observe, consolidate."""
    _, heads, groups, d, budget = graph.sizes_of(tiny)
    layers = [graph.Layer(family, device, store, rows, heads, groups, d, budget) for _ in range(2 if tiny else LAYERS)]
    row = {"family": family.name, "store": store, "rows": rows, "layers": len(layers)}
    caches, observed = [layer.cache for layer in layers], [layer.mass for layer in layers]
    together = LayersOf(caches, observed, LayerTable(device).of(caches, observed))
    # Row i is i tokens ahead: in one step none of the first rows is near its event, in the other one of them retires.
    for name, number in (("idle", 5 if tiny else 20), ("due", layers[0].schedule.retire_tokens + 4)):
        for layer in layers:
            layer.prepare(number)
        seconds = timer(lambda: forward(layers, together))
        row |= {f"{name}_us": seconds * 1e6, f"{name}_rows_due": layers[0].retired()}
    return row


def forward(layers: list[graph.Layer], together: LayersOf) -> None:
    """As attention/cuda_backend.py: every layer attends, then all retire."""
    first = layers[0]
    for layer in layers:
        layer.attend()
    first.family.consolidate_layers(together, first.work.retires[0], first.policy, SINKS, first.scale)


def prefill(
    family, timer: Timer, grain: int, prompt: int, budget: int, device: str, size: dict[str, int]
) -> dict[str, Any]:
    """Attention of a prompt in one layer: an event after every `grain` tokens, against causal attention over all of it."""
    shape = Shape(rows=1, slots=budget + grain, queries=grain, record="zeroth", **size)
    case = Case(shape, device)
    checked(family, case, f"{family.name}, grain {grain}")
    work = Case(Shape(rows=1, slots=budget + grain, **size), device)
    due = work.retire_work(grain // shape.page_size)
    attend = timer(lambda: case.attend(family, True))
    event = timer(lambda: family.consolidate(work.cache, work.mass, due, POLICY, SINKS, work.scale))
    events = (prompt - budget) // grain
    stock = timer(baselines.causal(prompt, shape, device))
    head = timer(baselines.causal(budget, shape, device))
    ours = head + events * (attend + event)
    row = {"family": family.name, "grain": grain, "prompt": prompt, "attend_us": attend * 1e6, "event_us": event * 1e6}
    return row | {"ours_us": ours * 1e6, "stock_us": stock * 1e6, "to_stock": ours / stock}
