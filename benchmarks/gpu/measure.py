"""The timings of runs B and C, each a row of a table; ratios against a baseline of the same worker."""

from typing import Any

import baselines
import graph
import heads as heads_of_their_own
from cases import Case, Shape
from check import POLICY, ROUNDING, close, reference
from machine import Timer
from shape import SINKS

from momentkv_vllm.page_schedule import DEFAULT_RETIRE_SHARE


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


def variant(timer: Timer, shape: Shape, tuning, store: str, device: str, tiny: bool) -> dict[str, Any]:
    """A declared variant of the Triton kernels (triton_kernels/tuning.py) over a store of a type."""
    from momentkv_vllm.triton_kernels.attend_chunk import attend_chunk
    from momentkv_vllm.triton_kernels.attend_decode import attend_decode

    if store == "model":
        case = Case(shape, device)
        cache, query, output, work, scale = case.cache, case.query, case.output, case.work, case.scale
    else:
        _, heads, groups, d, _ = graph.sizes_of(tiny)
        layer = graph.Layer(reference, device, store, shape.rows, heads, groups, d, shape.slots, full=not tiny)
        layer.prepare(8)
        cache, query, output, work, scale = layer.cache, layer.query, layer.output, layer.work.attends[0], layer.scale
    attend, more = (attend_decode, ()) if shape.queries == 1 else (attend_chunk, (shape.queries,))
    given = cache, query, output, None, work, scale, True, *more, tuning
    reference.attend(cache, query, output, None, work, scale, True)
    want = output.clone()
    attend(*given)
    close(output, want, ROUNDING[shape.dtype], f"{store}, {tuning}")
    row = {"store": store, "queries": shape.queries, "rows": shape.rows, "budget": shape.slots, **tuning._asdict()}
    return row | {"us": timer(lambda: attend(*given)) * 1e6}


def step(
    family,
    timer: Timer,
    bandwidth: float,
    store: str,
    rows: int,
    layers: int,
    device: str,
    tiny: bool,
    own: bool = False,
) -> dict[str, Any]:
    """A step's attention of some layers in one graph: write, attend, observe, consolidate; stores are full. The floor: the time
    to copy a budget's bytes. own: heads have budgets of their own."""
    _, heads, groups, d, budget = graph.sizes_of(tiny)
    made = full_layers(family, store, rows, layers, device, tiny)
    if own:
        heads_of_their_own.share_out(made)
    row = {"family": family.name, "store": store, "rows": rows, "layers": layers, "own_budgets": own}
    held = Shape(head_dim=d, kv_heads=heads, groups=groups, slots=budget, rows=rows).kv_bytes
    row["floor_us"] = layers * held / bandwidth * 1e6
    layers = made
    together = graph.together_of(layers, device)
    # Row i is i tokens ahead: in one step none of the first rows is near its event, in the other one of them retires.
    for name, number in (("idle", 5 if tiny else 20), ("due", layers[0].schedule.retire_tokens + 4)):
        for layer in layers:
            layer.prepare(number)
        seconds = timer(lambda: graph.forward(layers, together))
        row |= {f"{name}_us": seconds * 1e6, f"{name}_rows_due": layers[0].retired()}
    return row


def rounding(family, timer: Timer, rows: int, layers: int, device: str, tiny: bool) -> dict[str, Any]:
    """What ends a decode step in which rows retire, without and with feedback of errors in keys, of int4 stores that are full."""
    made = full_layers(family, "int4", rows, layers, device, tiny)
    for layer in made:
        layer.prepare(made[0].schedule.retire_tokens + 4)
    row = {"family": family.name, "rows": rows, "layers": layers, "rows_due": made[0].retired()}
    for name, feedback in (("nearest", None), ("fed_back", graph.feedback_for(made[0].cache))):
        for layer in made:
            layer.cache.feedback = None if feedback is None else feedback.clone()
        together = graph.together_of(made, device)
        row[f"{name}_us"] = timer(lambda of=together: graph.retire_all(made, of)) * 1e6
    return row


def full_layers(family, store: str, rows: int, layers: int, device: str, tiny: bool) -> list[graph.Layer]:
    _, heads, groups, d, budget = graph.sizes_of(tiny)
    return [graph.Layer(family, device, store, rows, heads, groups, d, budget, full=not tiny) for _ in range(layers)]
