"""Sessions whose prompt arrives in pieces (vLLM's streaming input): every answer is that of one request over the same text."""

import pytest
from engine import Engine, random_prompt
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

PIECES = [random_prompt(150, seed=1), *(random_prompt(n, seed=n) for n in (150, 120, 300))]
NEW = 20


def ask_in_pieces(
    e: Engine, pieces: list[list[int]], stop: tuple[int, ...] = (), classes: tuple[str, ...] = ()
) -> tuple[list[list[int]], list[list[int]]]:
    """The answer after each piece, and the text that it answers. vLLM drops the last token of an answer that goes on.

    stop: tokens that end the first answer. classes: that the first pieces ask for, the others for none.
    """
    core = e.vllm.engine_core.engine_core
    answers, texts, text = [], [], []
    for piece in pieces:
        ends = list(stop) if not answers else []
        asked = {"kv_budget": classes[len(answers)]} if len(answers) < len(classes) else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=NEW, ignore_eos=True, stop_token_ids=ends, extra_args=asked
        )
        given = {"prompt_token_ids": list(piece)}  # vLLM extends the list that it is given
        request = e.vllm.input_processor.process_inputs(
            "s", given, sampling, resumable=True, supported_tasks=("generate",)
        )
        request.external_req_id = "s"
        core.add_request(*core.preprocess_add_request(request))
        answer: list[int] = []
        while len(answer) < NEW and not (answer and answer[-1] in ends):
            outputs, _ = core.step_fn()
            e.manager.check_integrity(requests=e.scheduler.requests)
            answer += [t for o in (outputs or {}).values() for x in o.outputs for t in x.new_token_ids]
        answers.append(answer)
        texts.append(text + piece)
        text = text + piece + answer[:-1]
    e.scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
    while e.scheduler.has_requests():
        core.step_fn()
    return answers, texts


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("prefill", ["chunked", "coarse", "full", "auto"])
def test_answers_are_those_of_one_request(engine, models, prefill, pipelined):
    """Pieces end below the budget, evict, and go on evicting; after exact prompts, and where events in a prompt are further
    apart, the longer prompt is read again."""
    values = {"prefill": "chunked", "prefill_retire_tokens": 64} if prefill == "coarse" else {"prefill": prefill}
    e = engine(
        models(seed=1), policy="momentkv", budget_tokens=384, **values, exact_prompt_tokens=650, pipelined=pipelined,
        enable_prefix_caching=True, max_num_batched_tokens=128,
    )  # fmt: skip
    answers, texts = ask_in_pieces(e, PIECES)
    assert e.manager.metrics.values and len(texts[-1]) > 700
    assert [e.generate([t], NEW)[0] for t in texts] == answers


def test_a_step_in_flight_has_reached_the_event(engine, models):
    """A stop token ends the first answer while the token after it is computed, which vLLM then drops. That step may have
    observed for the first event, at 256 tokens, or retired pages."""
    e = engine(models(seed=1), policy="momentkv", budget_tokens=256, pipelined=True, max_num_batched_tokens=300)
    overtaken = 0
    for length in range(236, 250):
        piece = random_prompt(length)
        (plain,) = e.generate([piece], NEW)
        stop = next(t for i, t in enumerate(plain) if i > 4 and t not in plain[:i])
        answers, texts = ask_in_pieces(e, [piece, random_prompt(90, seed=2)], (stop,))
        assert answers[0] == plain[: plain.index(stop) + 1]
        assert e.generate([texts[1]], NEW)[0] == answers[1], (
            f"first piece of {length} tokens, answer of {len(answers[0])}"
        )
        overtaken += length + len(answers[0]) in range(250, 258)
    assert overtaken > 2, "no step in flight came near the event"


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("first", ["large", "exact"])
def test_a_session_keeps_the_class_of_its_first_piece(engine, models, first, pipelined):
    """A later piece names another class, the ones after that none; the answers are those of the first class throughout."""
    e = engine(
        models(seed=1), policy="momentkv", budgets={"small": 256, "large": 384, "exact": "off"}, pipelined=pipelined,
        enable_prefix_caching=True, max_num_batched_tokens=128,
    )  # fmt: skip
    answers, texts = ask_in_pieces(e, PIECES, classes=(first, "small"))
    assert [e.generate([t], NEW, extra_args={"kv_budget": first})[0] for t in texts] == answers
    assert e.generate([texts[-1]], NEW)[0] != answers[-1], "the classes answer alike: the test proves nothing"
