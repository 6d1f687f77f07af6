"""Blocks of several pages against a brute-force model that looks at every page."""

from drawn import schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from momentkv_vllm.page_blocks import PageBlocks
from momentkv_vllm.page_schedule import ANY_PROMPT, cdiv


def owned(blocks, settled, end):
    """Blocks of a sequence whose step ends at `end` tokens, after pages were freed at `settled`."""
    boundary = blocks.schedule.boundary_column(settled)
    columns = range(cdiv(cdiv(end, blocks.schedule.page_size), blocks.pages))
    return {c for c in columns if c < blocks.rewritten or c >= blocks.retired(boundary)}


def needed_pages(schedule, settled, end):
    """Pages that the step may read or write."""
    boundary, pages = schedule.boundary_column(settled), cdiv(end, schedule.page_size)
    kept = schedule.store_pages + schedule.moment_pages if boundary else 0
    return {*range(kept), *range(boundary, pages)}


@settings(max_examples=200, deadline=None)
@given(schedules(), st.integers(1, 9), st.integers(1, 60))
def test_a_sequence_owns_the_blocks_of_its_pages_and_no_wholly_retired_one(schedule, pages, step):
    blocks = PageBlocks(schedule, pages)
    bounded = schedule.exact_prompt_tokens == 0
    for settled in range(0, 40 * schedule.page_size, 7):
        held, need = owned(blocks, settled, settled + step), needed_pages(schedule, settled, settled + step)
        assert {page // pages for page in need} <= held
        assert all(b < blocks.rewritten or need & set(range(b * pages, b * pages + pages)) for b in held)
        if bounded:
            assert len(held) <= blocks.least_pool(step)
            assert len(owned(blocks, settled, settled + 1)) <= blocks.budget


@given(schedules(), st.integers(1, 9), st.integers(1, 400))
def test_blocks_cost_at_most_two_more_than_their_pages(schedule, pages, step):
    blocks = PageBlocks(schedule, pages)
    assert blocks.budget <= cdiv(schedule.budget_pages, pages) + 2
    assert blocks.least_pool(step) <= cdiv(schedule.least_pool_pages(step), pages) + 2
    if pages == 1:
        assert (blocks.budget, blocks.least_pool(step)) == (schedule.budget_pages, schedule.least_pool_pages(step))
        assert all(blocks.retired(b) == b for b in range(blocks.rewritten + 1, 60)) and blocks.retired(0) == 0
    if schedule.exact_prompt_tokens >= ANY_PROMPT:
        assert blocks.least_pool(step) == blocks.budget
