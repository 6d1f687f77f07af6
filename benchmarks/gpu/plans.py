"""The decode step's lists that the device makes against those of the host, over whole retiring periods."""

from typing import Any

import graph
import torch

from momentkv_vllm.attention.step_plan import StepPlanner
from momentkv_vllm.attention.step_plan_on_device import DecodePlanner

ROWS, CONTEXT = 64, 3


def compare(device: str) -> dict[str, Any]:
    """Rows of all ages, a step after the other. Raises AssertionError where a list differs."""
    compared = 0
    for store in graph.STORES:
        config, schedule, _, _ = graph.laid_out(store, 512, 64)
        host = StepPlanner([schedule], config, graph.POLICY)
        planner = DecodePlanner(schedule, config, graph.POLICY, ROWS, device)
        columns = CONTEXT * schedule.budget_pages
        table = torch.randperm(ROWS * columns).view(ROWS, columns).int() + 1
        query_start = torch.arange(ROWS + 1, dtype=torch.int32)
        for step in range(0, schedule.retire_tokens, 7):
            lens = torch.linspace(1, (columns - 6) * schedule.page_size, ROWS).int() + step
            made = planner.update(*(x.to(device) for x in (lens, query_start, table))).rounds[0]
            for row, end in enumerate(lens.tolist()):
                _compare_row(host, made, row, end, table)
                compared += 1
    return {"rows_compared": compared}


def _compare_row(host: StepPlanner, made, row: int, end: int, table: torch.Tensor) -> None:
    attend, retire = made.attends[0], made.retires[0]
    segment = next(host._segments(row, row, end - 1, end, 0, 0))
    want = host._attend([segment], table.numpy())
    width = want.pages.shape[1]
    assert attend.pages[row, :width].tolist() == want.pages[0].tolist() and not attend.pages[row, width:].any(), (
        row,
        end,
    )
    for name in ("first_token", "num_queries", "last_slot", "num_evicted", "observe_from", "restart"):
        assert getattr(attend, name)[row].item() == getattr(want, name)[0].item(), (name, row, end)
    retiring = [page for page in retire.retiring_pages[row].tolist() if page >= 0]
    due = host._retire([segment], table.numpy()) if segment.retire_to else None
    assert retiring == ([] if due is None else due.retiring_pages[0].tolist()), (row, end)
