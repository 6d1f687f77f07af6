"""What a request may ask for, with eviction on: the answer is that of another run of the same request, or follows from it."""

import pytest
from engine import random_prompt
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

EXACT = {"policy": "momentkv", "budget_tokens": 384, "moment_dtype": "float32"}
LONG = random_prompt(500)


def ask(e, prompt, **settings):
    """One request's final output."""
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **settings})
    sampling.output_kind = RequestOutputKind.FINAL_ONLY
    e._next += 1
    e.vllm.add_request(f"ask{e._next}", {"prompt_token_ids": prompt}, sampling)
    done = []
    while e.vllm.has_unfinished_requests():
        done += [o for o in e.step() if o.finished]
    (output,) = done
    return output


def test_what_one_engine_is_asked(engine, models):
    """One engine for all of these: parallel sampling, logprobs, stop strings, grammars, one-token and chunk-sized prompts."""
    e = engine(**EXACT, model=models(seed=1), enable_prefix_caching=True)
    plain = ask(e, LONG).outputs[0]
    # Parallel samples share a prompt and evict apart: read as prompts, their tokens have the same logprobs.
    for sample in ask(e, LONG, n=3, temperature=0.8, logprobs=1).outputs:
        tokens = list(sample.token_ids)
        read = ask(e, LONG + tokens, prompt_logprobs=1, max_tokens=1).prompt_logprobs[len(LONG) :]
        sampled = [step[t].logprob for step, t in zip(sample.logprobs, tokens)]
        assert [step[t].logprob for step, t in zip(read, tokens)] == pytest.approx(sampled, abs=1e-3)
    # Logprobs rank the chosen token first; those of the prompt do not depend on a hit (vLLM reads the prompt again for them).
    scored = ask(e, LONG, logprobs=3, prompt_logprobs=2)
    assert list(scored.outputs[0].token_ids) == list(plain.token_ids)
    assert all(step[t].rank == 1 for step, t in zip(scored.outputs[0].logprobs, plain.token_ids))
    assert len(scored.prompt_logprobs) == 500 and scored.num_cached_tokens == 0
    # A stop string ends the same text early, a grammar leaves only its words.
    word = plain.text.split()[7]
    assert plain.text.startswith(ask(e, LONG, stop=[word]).outputs[0].text)
    assert ask(e, LONG, stop=[word]).outputs[0].finish_reason == "stop"
    grammar = StructuredOutputsParams(choice=["w7", "w11"])
    assert ask(e, LONG, structured_outputs=grammar, ignore_eos=False).outputs[0].text.strip() in ("w7", "w11")
    # Very short prompts that grow past the budget, and one token too few and too many around it.
    for tokens, new in ((1, 400), (2, 40), (383, 40), (384, 40), (385, 40)):
        prompt = random_prompt(tokens)
        first = list(ask(e, prompt, max_tokens=new).outputs[0].token_ids)
        assert first == list(ask(e, prompt, max_tokens=new).outputs[0].token_ids) and len(first) == new
    with pytest.raises(VLLMValidationError, match="cannot be empty"):
        ask(e, [])


def test_beam_search(models):
    """Beams are new requests for every token: each finds its beginning in the prefix cache."""
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    best = []
    for caching in (False, True):
        llm = LLM(
            str(models(seed=1)), dtype="float32", enforce_eager=True, max_model_len=2048, num_gpu_blocks_override=400,
            enable_prefix_caching=caching, additional_config={"kv_eviction": EXACT}, max_num_batched_tokens=256,
        )  # fmt: skip
        (out,) = llm.beam_search([{"prompt_token_ids": LONG}], BeamSearchParams(beam_width=2, max_tokens=4))
        best.append([s.tokens for s in out.sequences])
        llm.llm_engine.engine_core.shutdown()
    assert best[0] == best[1] and len(best[0][0]) == 504


def test_an_urgent_request_preempts_and_nobody_loses_a_token(engine, models):
    options = {**EXACT, "model": models(seed=1), "enable_prefix_caching": True}
    prompts = [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240)]
    want = engine(**options).generate(prompts, 200)
    tight = engine(**options, scheduling_policy="priority", num_gpu_blocks_override=80, watermark=0.0)
    names = []
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        tight.vllm.add_request(f"p{number}", {"prompt_token_ids": prompt}, sampling, priority=-number)
        names.append(f"p{number}")
    tokens = tight.run()
    assert [tokens[n] for n in names] == want and tight.preemptions


@pytest.mark.parametrize("seqs", [1, 3])
def test_max_num_seqs(engine, models, seqs):
    e = engine(**EXACT, model=models(seed=1), max_num_seqs=seqs)
    running = []
    for n in (30, 390, 450, 500):
        e.add(random_prompt(n), 20)
    tokens = e.run(lambda step: running.append(len(e.scheduler.running)))
    assert max(running) == seqs and len(tokens) == 4


def test_preemptions_are_no_more_than_stock_has_in_the_same_pool(engine, models):
    prompts = [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240, 250)]
    counts = {}
    for name, options in (
        ("stock", {"block_size": 32, "num_gpu_blocks_override": 40}),
        ("ours", {**EXACT, "num_gpu_blocks_override": 80}),
    ):
        e = engine(models(seed=1), **options, enable_prefix_caching=True, watermark=0.0, max_model_len=1024)
        assert [len(t) for t in e.generate(prompts, 250)] == [250] * 6
        counts[name] = e.preemptions
    assert counts["ours"] <= counts["stock"] and counts["stock"] > 0


def test_a_model_length_far_above_the_pool(engine):
    """8,192 positions, a pool of 640 tokens: admission counts the budget and a chunk, never the prompt."""
    e = engine(**EXACT, max_model_len=8192, num_gpu_blocks_override=41)
    names = [e.add(random_prompt(n), 10) for n in (3000, 2500)]
    tokens = e.run()
    assert all(len(tokens[n]) == 10 for n in names)
    assert max(e.peak_pages.values()) <= e.manager.max_admission_blocks_per_request == 24 + 16
