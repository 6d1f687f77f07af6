"""Sessions whose prompt arrives in pieces (vLLM's streaming input): every answer is that of one request over the same text."""

import pytest
from engine import Engine, random_prompt
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

pytestmark = pytest.mark.engine

PIECES = [random_prompt(150, seed=1), *(random_prompt(n, seed=n) for n in (150, 120, 300))]
NEW = 20


def ask_in_pieces(e: Engine, pieces: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The answer after each piece, and the text that it answers. vLLM drops the last token of an answer that goes on."""
    core, sampling = e.vllm.engine_core.engine_core, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    answers, texts, text = [], [], []
    for piece in pieces:
        given = {"prompt_token_ids": list(piece)}  # vLLM extends the list that it is given
        request = e.vllm.input_processor.process_inputs(
            "s", given, sampling, resumable=True, supported_tasks=("generate",)
        )
        request.external_req_id = "s"
        core.add_request(*core.preprocess_add_request(request))
        answer: list[int] = []
        while len(answer) < NEW:
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
@pytest.mark.parametrize("prefill", ["chunked", "full"])
def test_answers_are_those_of_one_request(engine, models, prefill, pipelined):
    """Pieces end below the budget, evict, and go on evicting; in `full` prefill the longer prompt is read again."""
    e = engine(
        models(seed=1), policy="momentkv", budget_tokens=384, prefill=prefill, pipelined=pipelined,
        enable_prefix_caching=True, max_num_batched_tokens=128,
    )  # fmt: skip
    answers, texts = ask_in_pieces(e, PIECES)
    assert e.manager.metrics.values and len(texts[-1]) > 700
    assert [e.generate([t], NEW)[0] for t in texts] == answers


def test_a_step_in_flight_has_reached_the_event(engine, models):
    """With steps in flight the token after the last one of an answer is computed, then dropped. Answers end at every
    distance from the first event, at 256 tokens."""
    e = engine(models(seed=1), policy="momentkv", budget_tokens=256, pipelined=True, max_num_batched_tokens=300)
    for length in (*range(225, 238), 240):
        answers, texts = ask_in_pieces(e, [random_prompt(length), random_prompt(90, seed=2)])
        assert e.generate([texts[1]], NEW)[0] == answers[1], f"first piece of {length} tokens"
