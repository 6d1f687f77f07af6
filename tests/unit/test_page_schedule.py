"""The page schedule against a brute-force model that moves tokens one by one."""

from dataclasses import replace

import pytest
from drawn import schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.page_schedule import PageSchedule, build_schedule, cdiv


def walk(plan: PageSchedule, total: int, prompt: int) -> list[tuple[int, int]]:
    """(committed, boundary) after every token, by events alone."""
    boundary, out, exact = 0, [], prompt <= plan.exact_prompt_tokens
    for p in range(1, total + 1):
        past = p - plan.first_event_tokens
        # While more of the prompt is to come than to the next event of the finer grain, events are further apart.
        reads = not exact and past >= 0 and p + plan.retire_tokens <= prompt
        full = past >= 0 and past % (plan.prefill_retire_tokens if reads else plan.retire_tokens) == 0
        late = exact and p < prompt
        at_prompt_end = exact and p == prompt and prompt > plan.first_event_tokens
        if (full and not late) or at_prompt_end:
            grown = (max(p, plan.first_event_tokens) - plan.first_event_tokens) // plan.retire_tokens + 1
            boundary = plan.store_pages + plan.moment_pages + grown * plan.retire_pages
        out.append((p, boundary))
    return out


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(1, 400), st.integers(0, 300))
def test_boundary_is_what_the_events_leave(plan, total, prompt):
    for committed, boundary in walk(plan, total, prompt):
        assert plan.boundary_column(committed, prompt) == boundary
    changes = [b for (a, x), (b, y) in zip(walk(plan, total, prompt), walk(plan, total, prompt)[1:]) if x != y]
    assert list(plan.events(1, total, prompt)) == changes


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(1, 400), st.integers(0, 300), st.data())
def test_events_do_not_depend_on_the_cut(plan, total, prompt, data):
    whole = list(plan.events(0, total, prompt))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    parts = [e for a, b in zip([0, *cuts], [*cuts, total]) for e in plan.events(a, b, prompt)]
    assert parts == whole
    for e in whole:
        assert plan.last_event(e, prompt) == e
        assert plan.next_event(e - 1, prompt) == e


def live_pages(plan, committed_tokens, boundary):
    """Pages that a sequence owns in vLLM's pool."""
    return plan.retained_pages(committed_tokens, boundary) + (plan.moment_pages if boundary else 0)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(1, 400))
def test_live_pages_never_exceed_the_budget_in_decode(plan, total):
    for p in range(1, total + 1):
        boundary = plan.boundary_column(p - 1, 0)  # the next token is stored before its step retires anything
        assert live_pages(plan, p, boundary) <= plan.budget_pages
        after = plan.boundary_column(p, 0)
        window = p - after * plan.page_size
        if after:
            stored = plan.stored_tokens(after)
            assert plan.evicted_tokens(after) + stored + window == p  # n + store + window = committed
            assert stored == plan.store_tokens or not plan.evicted_tokens(after), (
                "nothing is evicted until the store is full"
            )
            assert stored % plan.run_tokens == 0 and stored <= plan.store_pages * (
                plan.store_page_tokens or plan.page_size
            )
            assert window >= (plan.window_pages - plan.retire_pages) * plan.page_size


@settings(max_examples=200, deadline=None)
@given(schedules(), st.integers(1, 60), st.integers(1, 400))
def test_live_pages_never_exceed_the_peak_in_chunked_prefill(plan, chunk, total):
    plan = replace(plan, exact_prompt_tokens=0)
    for start in range(0, total, chunk):
        end = min(total, start + chunk)
        boundary = plan.boundary_column(start, total)
        assert live_pages(plan, end, boundary) <= plan.peak_pages(chunk)
        assert live_pages(plan, start, boundary) <= plan.reading_pages


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 400), st.integers(0, 400))
def test_a_prompt_s_grain_ends_with_it(plan, prompt, new):
    """From its last token on a request has evicted what one without a coarse grain has, and owns no more than its budget."""
    plan = replace(plan, exact_prompt_tokens=0)
    one_grain = replace(plan, prefill_retire_pages=0)
    committed = prompt + new
    assert plan.boundary_column(committed, prompt) == one_grain.boundary_column(committed)
    assert plan.next_event(committed, prompt) == one_grain.next_event(committed)
    assert list(plan.events(prompt, committed, prompt)) == list(one_grain.events(prompt, committed))
    events = list(plan.events(0, prompt, prompt))
    assert events[:1] == list(one_grain.events(0, prompt))[:1], "the budget is full when it is full"
    gaps = [b - a for a, b in zip(events, events[1:])]
    assert all(gap == plan.prefill_retire_tokens for gap in gaps[:-1]) and all(
        gap <= plan.prefill_retire_tokens and gap % plan.retire_tokens == 0 for gap in gaps[-1:]
    )


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
def test_common_events_are_those_of_every_longer_prompt(plan, committed, prompt, longer):
    plan = replace(plan, exact_prompt_tokens=0)
    common = plan.last_common_event(committed, prompt)
    mine, others = (list(plan.events(0, committed, p)) for p in (prompt, prompt + longer))
    assert mine[: mine.index(common) + 1 if common else 0] == others[: others.index(common) + 1 if common else 0]
    after = [e for e in mine if e > common]
    assert not after or list(plan.events(0, after[0], 10**6)) != mine[: mine.index(after[0]) + 1]


def test_below_the_budget_nothing_happens():
    plan = build_schedule(EvictionConfig("momentkv", 256), 16, 2, False)
    assert plan.budget_pages == 16
    assert plan.boundary_column(255) == 0 and plan.boundary_column(256) > 0
    assert list(plan.events(0, 255)) == []


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("moment_pages", [0, 1, 5])
def test_too_small_a_budget_names_the_least_one(page_size, moment_pages):
    config = EvictionConfig("momentkv", 16)
    with pytest.raises(ValueError, match="budget_tokens=16 is too small") as error:
        build_schedule(config, page_size, moment_pages, False)
    least = int(str(error.value).split("the least is ")[1].split()[0])
    assert build_schedule(EvictionConfig("momentkv", least), page_size, moment_pages, False).budget_pages
    with pytest.raises(ValueError):
        build_schedule(EvictionConfig("momentkv", least - 1), page_size, moment_pages, False)


def test_window_only_policy_spends_everything_on_the_window():
    plan = build_schedule(EvictionConfig("streamingllm", 256, correction="off"), 16, 0, True)
    assert (plan.store_pages, plan.moment_pages, plan.window_pages) == (1, 0, 15)


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(1, 400), st.integers(1, 60))
def test_a_schedule_that_keeps_all_has_room_for_the_longest_sequence_and_no_event(plan, longest, step):
    kept = plan.keeping_all(longest)
    assert kept.page_size == plan.page_size and kept.is_packed == plan.is_packed
    assert kept.record_pages == plan.record_pages, "pages are read alike whatever the class"
    assert kept.boundary_column(longest, longest) == 0 and not list(kept.events(0, longest, longest))
    assert kept.least_pool_pages(step) == kept.budget_pages >= cdiv(longest, plan.page_size)
    least = kept.store_pages + kept.moment_pages + 1
    assert kept.budget_pages == max(least, cdiv(longest, plan.page_size))


def test_cdiv():
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
