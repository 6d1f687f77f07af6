"""What a kernel call works on: plain index tensors, built once a step and shared by all layers."""

from dataclasses import dataclass

import torch


@dataclass
class AttendWork:
    """Queries of some rows against the pages that each row retains.

    tokens:       [rows, queries] int64 index into the step's flat token list; padding repeats the row's first token.
    real:         [rows, queries] bool, False for padding.
    pages:        [rows, n] int64, store pages then window pages in order; padded with the null page 0.
    last:         [rows, queries] int64, last visible slot of `pages` for each query (causality of the shortened sequence).
    moment_pages: [rows, M] int64.
    count:        [rows] float32, n of the moments; 0 = no record.
    observed:     [rows, queries] bool, queries whose attention the policy wants, or None.
    restart:      [rows] bool, the observation before the row's next event begins in this work list, or None.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    pages: torch.Tensor
    last: torch.Tensor
    moment_pages: torch.Tensor
    count: torch.Tensor
    observed: torch.Tensor | None = None
    restart: torch.Tensor | None = None


@dataclass
class RetireWork:
    """Rows whose eviction event is due.

    store_pages:    [rows, S] int64.
    retiring_pages: [rows, K] int64 pages leaving the window, in order; -1 pads rows that retire fewer.
    moment_pages:   [rows, M] int64; at a row's first event some of the retiring pages themselves.
    count:          [rows] float32, n before the event.
    """

    store_pages: torch.Tensor
    retiring_pages: torch.Tensor
    moment_pages: torch.Tensor
    count: torch.Tensor
