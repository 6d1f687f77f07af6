"""Draft tokens by n-grams: accepted and rejected across page boundaries, the same tokens as without them."""

import pytest
from draft_run import NGRAM, run
from vllm import EngineArgs

EXACT = {
    "policy": "momentkv",
    "budget_tokens": 384,
    "moment_dtype": "float32",
    "enable_prefix_caching": True,
    "exact_prompt_tokens": 650,
    # No drafts where queries are observed.
    "observation_tokens": 8,
}


INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 128}
MODES = {
    "chunked": {**INT8, "prefill": "chunked"},
    "coarse": {"prefill": "chunked", "prefill_retire_tokens": 64},
    "full": {"prefill": "full"},
    "auto": {**INT8, "prefill": "auto"},
}


@pytest.mark.parametrize("mode", ["chunked", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODES)[1:])])
def test_tokens_are_those_without_drafts(models, mode):
    seen = run(models(seed=1), [30, 350, 381, 385, 600], 150, {**EXACT, **MODES[mode]})
    assert seen["got"] == seen["want"]
    assert seen["retired"][0] == seen["retired"][1] and seen["retired"][0][0] > 0
    assert not any(seen["events"]), "an event depends on draft tokens"
    steps = seen["steps"]
    drafts = sum(tokens - 1 for _, tokens in steps)
    positions = sum(map(len, seen["want"])) - len(seen["want"])
    assert len(steps) < positions, "no draft was accepted: the test proves nothing"
    assert drafts > positions - len(steps), "no draft was rejected: the test proves nothing"
    assert any(first // 16 < (first + tokens - 1) // 16 for first, tokens in steps), "no draft crossed a page"


def test_drafts_stop_at_the_events_of_their_class(models):
    """Those of 384 tokens; the default class evicts first at 1,024."""
    options = {**EXACT, "budgets": {"large": 1024, "small": 384}}
    del options["budget_tokens"]
    sampling = {"extra_args": {"kv_budget": "small"}}
    seen = run(models(seed=1), [350, 600], 150, options, sampling)
    assert seen["got"] == seen["want"] and not any(seen["events"]) and seen["steps"]
    assert seen["retired"][0] == seen["retired"][1] and seen["retired"][0][0] > 0


def test_a_prompt_that_comes_again_starts_from_its_state(models):
    seen = run(models(seed=1), [900, 900], 120, {**EXACT, "max_num_seqs": 1})
    assert seen["got"] == seen["want"] and seen["want"][0] == seen["want"][1]
    assert seen["cached"]["r1"] > 700


@pytest.mark.slow
def test_preemption_with_drafts(models):
    tight = {"num_gpu_blocks_override": 80, "watermark": 0.0}
    seen = run(models(seed=1), [200, 210, 220, 230, 240], 220, EXACT, **tight)
    assert seen["got"] == seen["want"] and seen["preemptions"]


@pytest.mark.parametrize(
    ("policy", "changes", "options", "words"),
    [
        ("momentkv", {"num_speculative_tokens": 15}, {}, "num_speculative_tokens 15 above 14"),
        ("h2o", {}, {}, "observes every query"),
        ("momentkv", {}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ("momentkv", {"method": "suffix"}, {}, "only 'ngram'"),
    ],
)
def test_what_stays_refused(models, policy, changes, options, words, monkeypatch):
    # The suffix drafter needs a package that is not installed; its absence must not hide our answer.
    monkeypatch.setattr("vllm.config.speculative.SpeculativeConfig._validate_suffix_decoding", lambda self: None)
    eviction = {"kv_eviction": {"policy": policy, "budget_tokens": 256}}
    args = EngineArgs(
        model=str(models()), additional_config=eviction, speculative_config={**NGRAM, **changes}, **options
    )
    with pytest.raises(ValueError, match=words):
        args.create_engine_config()
