"""The work lists of a decode step, made on the device: page_schedule.py for one query a row; then who retires.

The lists lie in buffers that never move and keep their shapes, so a captured CUDA graph reads this step's pages: a row that
retires nothing has the page -1 throughout, a padding row has no query, and the kernels leave both at once. Nothing waits
for the device. Checked against attention/step_plan.py (tests/kernels/test_decode_plan.py).
"""

import triton
import triton.language as tl


@triton.jit
def _grain(committed, caught_up, RETIRE: tl.constexpr, READ: tl.constexpr):
    """Tokens between events around `committed`: READ while the prompt is read, until its catch-up event."""
    return tl.where(committed < caught_up, READ, RETIRE)


@triton.jit
def _last_event(committed, caught_up, FIRST: tl.constexpr, RETIRE: tl.constexpr, READ: tl.constexpr):
    """EventCounts.last_event for chunked prefill."""
    past = committed - FIRST
    return tl.where(past < 0, 0, committed - past % _grain(committed, caught_up, RETIRE, READ))


@triton.jit
def _next_event(committed, caught_up, FIRST: tl.constexpr, RETIRE: tl.constexpr, READ: tl.constexpr):
    """EventCounts.next_event, likewise."""
    grain = _grain(committed, caught_up, RETIRE, READ)
    event = _last_event(committed, caught_up, FIRST, RETIRE, READ) + grain
    event = tl.where(committed < caught_up, tl.minimum(event, caught_up), event)
    return tl.where(committed < FIRST, FIRST, event)


@triton.jit
def _boundary(event, FIRST: tl.constexpr, RETIRE: tl.constexpr, RETIRE_PAGES: tl.constexpr, S_M: tl.constexpr):
    """PageSchedule.boundary_column after an event; 0: there was none."""
    return tl.where(event == 0, 0, S_M + ((event - FIRST) // RETIRE + 1) * RETIRE_PAGES)


@triton.jit
def _plan(
    seq_lens, query_start, table, prompts, first_token, num_queries, pages, last_slot, stored, moment_pages, num_evicted,
    observe_from, restart, store_pages, retiring_pages, table_row, num_columns,
    PAGE: tl.constexpr, S: tl.constexpr, M: tl.constexpr, RECORD: tl.constexpr, RECORD_PAGES: tl.constexpr,
    CAPACITY: tl.constexpr, EQUAL: tl.constexpr, IS_PACKED: tl.constexpr, FIRST: tl.constexpr, RETIRE_PAGES: tl.constexpr,
    READ_PAGES: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, OBSERVED: tl.constexpr, OBSERVE_ALL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program row. RECORD: first column of the moment record's pages; CAPACITY: tokens of a full store; EQUAL: that have left the
    window until when no head evicts; OBSERVED: queries before an event that the policy observes, 0 if none; READ_PAGES: pages
    between events while a prompt is read."""
    RETIRE: tl.constexpr = RETIRE_PAGES * PAGE
    READ: tl.constexpr = READ_PAGES * PAGE
    row = tl.program_id(0)
    first = tl.load(query_start + row).to(tl.int64)
    queries = tl.load(query_start + row + 1).to(tl.int64) - first
    end = tl.load(seq_lens + row).to(tl.int64)
    queries = tl.where(end > 0, queries, 0)
    start = end - queries
    caught_up = end - end
    if READ != RETIRE:
        prompt = tl.load(prompts + row).to(tl.int64)
        caught_up = tl.where(prompt > FIRST, prompt - (prompt - FIRST) % RETIRE, FIRST)
    earlier = _last_event(start, caught_up, FIRST, RETIRE, READ)
    before = _boundary(earlier, FIRST, RETIRE, RETIRE_PAGES, S + M)
    after = _boundary(_last_event(end, caught_up, FIRST, RETIRE, READ), FIRST, RETIRE, RETIRE_PAGES, S + M)
    table += row * table_row
    tl.store(first_token + row, first)
    tl.store(num_queries + row, queries)
    if IS_PACKED:
        # Slots are then counted from the first window page.
        tl.store(last_slot + row, start - before * PAGE)
        tl.store(stored + row, tl.minimum(before * PAGE, CAPACITY))
    else:
        tl.store(last_slot + row, start - tl.where(before > 0, (before - S) * PAGE, 0))
    tl.store(num_evicted + row, tl.maximum(before * PAGE - CAPACITY, 0).to(tl.float32))

    j = tl.arange(0, BLOCK)
    column = tl.where((j < S) | (before == 0), j, before + j - S)
    used = (end + PAGE - 1) // PAGE - tl.where(before > 0, before - S, 0)
    page = tl.load(table + column, mask=(j < used) & (column < num_columns), other=0).to(tl.int64)
    tl.store(pages + row * COLUMNS + j, page, mask=j < COLUMNS)
    m = tl.arange(0, BLOCK_M)
    page = tl.load(table + RECORD + m, mask=(m < RECORD_PAGES) & (RECORD + m < num_columns), other=0).to(tl.int64)
    tl.store(moment_pages + row * RECORD_PAGES + m, page, mask=m < RECORD_PAGES)
    s = tl.arange(0, BLOCK_S)
    tl.store(store_pages + row * S + s, tl.load(table + s, mask=(s < S) & (s < num_columns), other=0), mask=s < S)
    k = tl.arange(0, BLOCK_K)
    retire_from = tl.where(before > 0, before, S)
    column = retire_from + k
    page = tl.load(table + column, mask=(column < after) & (column < num_columns), other=0).to(tl.int64)
    tl.store(retiring_pages + row * K + k, tl.where((column < after) & (after > before), page, -1), mask=k < K)

    if OBSERVED > 0:
        if OBSERVE_ALL:
            zone = end - end
        else:
            event = _next_event(start, caught_up, FIRST, RETIRE, READ)
            zone = tl.maximum(event - OBSERVED, earlier)
            # A quantised store that still has room evicts nothing: nobody competes.
            evicts = _boundary(event, FIRST, RETIRE, RETIRE_PAGES, S + M) * PAGE > EQUAL
            zone = tl.where(evicts, zone, event)
        tl.store(observe_from + row, tl.minimum(tl.maximum(zone - start, 0), queries))
        tl.store(restart + row, (start <= zone) & (zone < end) & (queries > 0))


@triton.jit
def _due(due, retiring_pages, row_retiring, rows, BLOCK: tl.constexpr):
    """One program: how many rows retire a page, then their numbers in order."""
    row = tl.arange(0, BLOCK)
    retires = tl.load(retiring_pages + row * row_retiring, mask=row < rows, other=-1) >= 0
    place = tl.cumsum(retires.to(tl.int32), 0)
    tl.store(due, tl.sum(retires.to(tl.int64), 0))
    tl.store(due + place, row.to(tl.int64), mask=retires)


def plan(
    seq_lens, query_start, block_table, prompts, attend, retire, schedule, observed: int, observe_all: bool
) -> None:
    """Fill the first len(seq_lens) rows of the lists `attend` and `retire` (kernels/worklists.py).

    Args:
        seq_lens: [rows] int32 committed tokens at the end of the step, 0 for padding.
        query_start: [rows + 1] int32 index of each row's query in the flat token list; one query a row, none for padding.
        block_table: [rows, columns] int32.
        prompts: [rows] int32 lengths of prompts; read where the schedule `reads_prompt_lengths`.
        schedule: page_schedule.PageSchedule without exact prompts.
        observed: queries before an event that the policy observes, 0 if none; observe_all: all queries instead.
    """
    s, m, record = schedule.store_pages, schedule.moment_pages, schedule.record_pages
    columns, k = attend.pages.shape[1], retire.retiring_pages.shape[1]
    record_pages = record.stop - record.start
    power = triton.next_power_of_2
    _plan[(len(seq_lens),)](
        seq_lens, query_start, block_table, prompts, attend.first_token, attend.num_queries, attend.pages, attend.last_slot,
        attend.stored, attend.moment_pages, attend.num_evicted, attend.observe_from, attend.restart, retire.store_pages,
        retire.retiring_pages, block_table.stride(0), block_table.shape[1],
        PAGE=schedule.page_size, S=s, M=m, RECORD=record.start, RECORD_PAGES=record_pages, CAPACITY=schedule.store_tokens,
        EQUAL=schedule.equal_tokens or schedule.store_tokens, IS_PACKED=schedule.is_packed,
        FIRST=schedule.first_event_tokens, RETIRE_PAGES=schedule.retire_pages,
        READ_PAGES=max(schedule.prefill_retire_pages, schedule.retire_pages), COLUMNS=columns, K=k, OBSERVED=observed,
        OBSERVE_ALL=observe_all, BLOCK=power(columns), BLOCK_S=power(s), BLOCK_M=power(max(1, record_pages)),
        BLOCK_K=power(k), num_warps=1,
    )  # fmt: skip
    _due[(1,)](
        retire.due, retire.retiring_pages, retire.retiring_pages.stride(0), len(seq_lens), BLOCK=power(len(retire.due))
    )
