"""What hypothesis draws."""

from hypothesis import strategies as st

from momentkv_vllm.page_schedule import ANY_PROMPT, PageSchedule


@st.composite
def schedules(draw):
    retire, page_size, store_pages = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 2, 4, 16])),
        draw(st.integers(1, 6)),
    )
    packed, run_tokens = draw(st.booleans()), draw(st.sampled_from([1, page_size]))
    return PageSchedule(
        page_size=page_size,
        store_pages=store_pages,
        moment_pages=draw(st.integers(0, 3)),
        window_pages=retire + draw(st.integers(1, 4)),
        retire_pages=retire,
        exact_prompt_tokens=draw(st.sampled_from([0, 100, ANY_PROMPT])),
        store_page_tokens=draw(st.integers(page_size + 1, 4 * page_size)) if packed else 0,
        record_tokens=draw(st.integers(0, page_size)) if packed else 0,
        run_tokens=run_tokens,
        prefill_retire_pages=retire * draw(st.integers(0, 5)),
    )
