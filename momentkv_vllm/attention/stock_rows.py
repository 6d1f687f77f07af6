"""Rows of a step that are below their budget, as a batch of their own for vLLM's kernel."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class StockRows:
    """Rows below their budget, which vLLM's own kernel serves.

    index:       [rows] int64 their numbers in the step.
    tokens:      [their tokens] int64 indices in the step's flat token list.
    query_start: [rows + 1] int32 where each row begins in `tokens`.
    """

    index: torch.Tensor
    tokens: torch.Tensor
    query_start: torch.Tensor

    @classmethod
    def of(cls, rows: list[int], starts: list[int]) -> "StockRows":
        """On the host. starts: [num_requests + 1] of each request in the flat token list."""
        index = torch.tensor(rows)
        lens = torch.tensor([starts[r + 1] - starts[r] for r in rows])
        tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
        query_start = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
        return cls(index, tokens, query_start)


@dataclass
class StockPart:
    """The batch: `tokens` are its indices in the step's flat token list, `metadata` is vLLM's."""

    tokens: torch.Tensor
    metadata: Any


def stock_part(
    rows: StockRows,
    query_start_cpu: torch.Tensor,
    common: CommonAttentionMetadata,
    build: Callable[[int, CommonAttentionMetadata], Any],
) -> StockPart:
    """The rows `rows` of a step, their metadata made by vLLM's `build`.

    Args:
        rows: on the step's device.
        query_start_cpu: its `query_start` on the host.
    """
    batch = replace(
        common,
        query_start_loc=rows.query_start,
        query_start_loc_cpu=query_start_cpu,
        seq_lens=common.seq_lens[rows.index],
        num_reqs=len(rows.index),
        num_actual_tokens=len(rows.tokens),
        max_query_len=int(query_start_cpu.diff().max()),
        block_table_tensor=common.block_table_tensor[rows.index],
        slot_mapping=common.slot_mapping[rows.tokens],
    )
    return StockPart(rows.tokens, build(0, batch))
