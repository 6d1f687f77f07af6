"""Layers that read the cache of an earlier one: they see what the next event takes, and the event comes after them."""

import itertools

import pytest
from engine import random_prompt
from vllm import SamplingParams

from momentkv_vllm.attention.cpu_backend import MomentKVImpl
from momentkv_vllm.kernels.cpu import Cpu

BUDGET = 256
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048}
INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 128}
PROMPTS = [random_prompt(n, seed=2) for n in (90, 300, 700)]
NAMES = ["Gemma 3n", "Gemma 4 E"]


pytestmark = pytest.mark.usefixtures("inspected_here")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Gemma 3n", {}),
        ("Gemma 4 E", INT8),
        ("Gemma 4 E", {"policy": "h2o"}),
        ("Gemma 3n", {"prefill": "full"}),
    ],
    ids=["momentkv", "int8", "h2o", "full"],
)
def test_tokens_do_not_depend_on_scheduling(engine, family_model, name, settings):
    """Alone in large steps; together in small ones, the second time from prefixes and states where there are any."""
    one = engine(family_model(name), **EVICT | settings, max_num_batched_tokens=1024)
    alone = [one.generate([p], 16)[0] for p in PROMPTS]
    caching = settings.get("policy") != "h2o"
    many = engine(family_model(name), **EVICT | settings, max_num_batched_tokens=64, enable_prefix_caching=caching)
    for _ in range(2):
        assert many.generate(PROMPTS, 16) == alone
    if caching and not settings.get("prefill"):
        assert list(many.cached_tokens.values())[-1] > BUDGET // 2, "the second time a state was meant to be found"


def test_requests_of_several_budgets_get_what_an_engine_of_theirs_gives(engine, family_model):
    """Beside each other in small steps: each of them has its events, and its last readers, where its own budget says."""
    e = engine(family_model("Gemma 4 E"), **{**EVICT, "budgets": "256,512,off"}, max_num_batched_tokens=64)
    names = [e.add(p, 24, extra_args={"kv_budget": name}) for p in PROMPTS for name in ("256", "512", "off")]
    tokens = e.run()
    alone = [
        engine(family_model("Gemma 4 E"), **EVICT | {"budget_tokens": n}).generate(PROMPTS, 24) for n in (256, 512)
    ]
    alone.append(engine(family_model("Gemma 4 E"), max_model_len=2048).generate(PROMPTS, 24))
    assert [tokens[n] for n in names] == [answers[i] for i in range(len(PROMPTS)) for answers in alone]
    assert len({tuple(tokens[n]) for n in names[-3:]}) == 3, "the budgets answer alike: the test proves nothing"


def test_tokens_are_those_of_an_engine_that_never_preempts(engine, family_model):
    prompts = [random_prompt(n, seed=4) for n in (100, 110, 120)]
    roomy = engine(family_model("Gemma 3n"), **EVICT).generate(prompts, 160)
    tight = engine(
        family_model("Gemma 3n"), **EVICT, num_gpu_blocks_override=37, max_num_batched_tokens=64, watermark=0.0
    )
    assert tight.generate(prompts, 160) == roomy
    assert tight.preemptions and tight.manager.metrics.values, "nobody was in the way"


def test_reference_and_cpu_kernels_agree(engine, family_model):
    tokens = [
        engine(family_model("Gemma 4 E"), **EVICT, kernels=kernels).generate(PROMPTS[2:], 24)
        for kernels in ("cpu", "reference")
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_event_comes_after_the_last_reader(engine, family_model, name, monkeypatch):
    """Of one cache: its owner's attention, that of every reader, then the event; once a step while decoding."""
    log = []
    attend, consolidate = Cpu._attend, Cpu.consolidate

    def attends(self, cache, *args):
        log.append((cache.kv.data_ptr(), "attend"))
        return attend(self, cache, *args)

    def consolidates(self, cache, *args):
        log.append((cache.kv.data_ptr(), "retire"))
        return consolidate(self, cache, *args)

    monkeypatch.setattr(Cpu, "_attend", attends)
    monkeypatch.setattr(Cpu, "consolidate", consolidates)
    e = engine(family_model(name), **EVICT, kernels="cpu")
    e.generate([random_prompt(250)], 120)
    layers = e.vllm.vllm_config.compilation_config.static_forward_context.values()
    readers = [x for x in layers if x.kv_sharing_target_layer_name and x.impl.config is not None]
    shared = readers[0].kv_cache.data_ptr()
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(k for cache, k in log if cache == shared)]
    attends_each, events = len(readers) + 1, [n for kind, n in runs if kind == "retire"]
    assert len(events) > 3 and set(events) == {1}
    assert all(n % attends_each == 0 for kind, n in runs[1:] if kind == "attend")
    assert isinstance(readers[0].impl, MomentKVImpl)


def test_logprobs_of_prompts_do_not_depend_on_scheduling(engine, family_model):
    """All tokens of a prompt are asked for, also those before an event inside a step."""

    def logprobs(steps, **eviction):
        e = engine(
            family_model("Gemma 4 E"), max_model_len=2048, block_size=32, max_num_batched_tokens=steps, **eviction
        )
        e.vllm.add_request(
            "r", {"prompt_token_ids": PROMPTS[2]}, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
        )
        while e.vllm.has_unfinished_requests():
            done = [o for o in e.step() if o.finished]
        e.peak_pages.clear()
        given = zip(PROMPTS[2][1:], done[0].prompt_logprobs[1:], strict=True)
        return [known[token].logprob for token, known in given]

    evicting = {"policy": "momentkv", "budget_tokens": BUDGET}
    coarse, fine, stock = logprobs(1024, **evicting), logprobs(64, **evicting), logprobs(1024)
    assert coarse == pytest.approx(fine, abs=1e-4)
    assert coarse[: BUDGET - 1] == pytest.approx(stock[: BUDGET - 1], abs=1e-4)
    assert coarse != pytest.approx(stock, abs=1e-1), "nothing was evicted"
