"""Drafters with attention layers of their own: their layers evict beside the model's, and change none of its tokens."""

from dataclasses import dataclass

import draft_models
import pytest
from engine import Engine, random_prompt
from family_settings import layers
from model_families import make_model
from vllm import EngineArgs

from momentkv_vllm.metrics import EVICTED_TOKENS, RETIRED_PAGES

EVICTION = {"policy": "momentkv", "budget_tokens": 384, "moment_dtype": "float32", "observation_tokens": 8}
INT8 = {"store_dtype": "int8", "run_tokens": 8, "budget_tokens": 128, "head_budgets": "equal"}
MODES = {
    "chunked": {**INT8, "prefill": "chunked"},
    "coarse": {"prefill": "chunked", "prefill_retire_tokens": 64},
    "full": {"prefill": "full"},
    "auto": {**INT8, "prefill": "auto", "exact_prompt_tokens": 650},
}


@dataclass
class Served:
    """What an engine made of some requests.

    tokens: of each. checked: of every draft of a request that went on, (tokens drafted, of these accepted).
    evicted: pages retired and tokens evicted. layers: whose memory the metrics count. cached, preemptions: as of `Engine`.
    """

    tokens: list[list[int]]
    checked: list[tuple[int, int]]
    evicted: list[float]
    layers: int
    cached: dict[str, int]
    preemptions: int

    @property
    def drafted(self) -> int:
        return sum(drafts for drafts, _ in self.checked)

    @property
    def accepted(self) -> int:
        return sum(accepted for _, accepted in self.checked)


def serve(model, prompts: list[list[int]], new_tokens: int, sampling: dict | None = None, **options) -> Served:
    """By an engine of its own, which ends with an empty pool."""
    e, checked = Engine(model, **options), []
    update = e.scheduler.update_from_output

    def watched(scheduled, output):
        result = update(scheduled, output)
        for name, drafts in scheduled.scheduled_spec_decode_tokens.items():
            if name in e.scheduler.requests:
                checked.append((len(drafts), len(output.sampled_token_ids[output.req_id_to_index[name]]) - 1))
        return result

    e.scheduler.update_from_output = watched
    tokens = e.generate(prompts, new_tokens, **sampling or {})
    evicted = [e.manager.metrics.values[m, 0] for m in (RETIRED_PAGES, EVICTED_TOKENS)]
    layers = e.manager.kv_cache_spec.layers
    e.close()
    return Served(tokens, checked, evicted, layers, e.cached_tokens, e.preemptions)


def with_drafts(
    model, drafts: dict, prompts: list[list[int]], new_tokens: int = 100, heads: int = 1, **options
) -> Served:
    """The tokens must be those without drafts, and as much be evicted.

    heads: KV of a draft model's layer, in layers of the model."""
    plain = serve(model, prompts, new_tokens, **options)
    served = serve(model, prompts, new_tokens, **options, speculative_config=drafts)
    assert served.tokens == plain.tokens
    assert served.evicted == plain.evicted or served.preemptions or served.cached != plain.cached
    assert plain.evicted[0] > 0, "nothing was evicted: the test proves nothing"
    assert served.layers == plain.layers + (heads * plain.layers if drafts["method"] == "draft_model" else 1)
    return served


def by(method: str, folder=None, tokens: int = 4) -> dict:
    named = {"model": str(folder)} if folder else {}
    return {"method": method, "num_speculative_tokens": tokens, **named}


def some_prompts() -> list[list[int]]:
    return [random_prompt(n, seed=5) for n in (30, 350, 385, 600)]


@pytest.mark.parametrize("mode", ["chunked", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODES)[1:])])
def test_a_draft_model_that_is_the_model_never_errs(models, mode):
    """Its layers then hold what the model's do, after every event."""
    model = models(seed=1)
    served = with_drafts(model, by("draft_model", model), some_prompts(), **EVICTION | MODES[mode])
    assert served.accepted == served.drafted > 100


@pytest.mark.slow
def test_heads_with_budgets_of_their_own(models):
    """The drafter's have none: its layers hold other tokens than the model's, and err."""
    model, measured = models(seed=1), {**INT8, "head_budgets": "measured"}
    served = with_drafts(model, by("draft_model", model), some_prompts(), **EVICTION | measured)
    assert served.drafted / 2 < served.accepted < served.drafted


@pytest.mark.slow
def test_each_request_evicts_as_its_class_says(models):
    """That is 128 tokens; the default class evicts first at 1,024."""
    model, options = models(seed=1), {**EVICTION, **INT8, "budgets": {"large": 1024, "small": 128}}
    del options["budget_tokens"]
    small = {"extra_args": {"kv_budget": "small"}}
    served = with_drafts(model, by("draft_model", model), some_prompts(), sampling=small, **options)
    assert served.accepted == served.drafted > 100


def test_drafts_that_are_rejected(models, tmp_path):
    """What a drafter wrote for them is written again."""
    model = models(seed=1)
    noisy = draft_models.make_noisy(tmp_path / "noisy", model)
    served = with_drafts(model, by("draft_model", noisy), some_prompts(), **EVICTION)
    assert served.drafted / 4 < served.accepted < served.drafted * 0.9


def test_eagle(tmp_path):
    model = draft_models.make_one_layer(tmp_path / "model")
    head = draft_models.make_eagle(tmp_path / "head", model)
    served = with_drafts(model, by("eagle", head), some_prompts(), **EVICTION)
    assert served.drafted * 0.8 < served.accepted < served.drafted


@pytest.mark.slow
def test_eagle3(tmp_path):
    model = draft_models.make_one_layer(tmp_path / "model")
    head = draft_models.make_eagle3(tmp_path / "head", model)
    served = with_drafts(model, by("eagle3", head), some_prompts(), **EVICTION)
    assert served.accepted < served.drafted


@pytest.mark.slow
def test_multi_token_prediction(tmp_path):
    model = draft_models.make_mtp_model(tmp_path / "model")
    served = with_drafts(model, by("mtp"), some_prompts(), **EVICTION)
    assert served.drafted * 0.8 < served.accepted < served.drafted


@pytest.mark.parametrize("drafter", ["draft_model", pytest.param("eagle", marks=pytest.mark.slow)])
def test_a_prompt_that_comes_again(models, tmp_path, drafter):
    """It starts from the state of its beginning, in which the drafter's pages are too."""
    model = draft_models.make_one_layer(tmp_path / "model")
    drafts = by(drafter, model if drafter == "draft_model" else draft_models.make_eagle(tmp_path / "head", model))
    prompts = [random_prompt(900, seed=5)] * 2
    options = EVICTION | {"enable_prefix_caching": True, "max_num_seqs": 1}
    served = with_drafts(model, drafts, prompts, **options)
    assert served.tokens[0] == served.tokens[1] and served.cached["r1"] > 700
    assert served.accepted >= served.drafted * (1 if drafter == "draft_model" else 0.8)


@pytest.mark.parametrize(
    "mode", ["coarse", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "auto", "measured"))]
)
@pytest.mark.parametrize("make", [draft_models.make_wide, draft_models.make_doubled])
def test_drafters_with_other_heads(models, tmp_path, make, mode):
    """Their pages have other sizes, and hold the same tokens. With a store as exact as the model, wide heads choose as narrow ones
    do. What a KV head keeps depends on the queries that it serves, so one that serves half of them errs at times."""
    model = models(seed=1)
    options = EVICTION | (MODES | {"measured": {**INT8, "head_budgets": "measured"}})[mode]
    served = with_drafts(model, by("draft_model", make(tmp_path, model)), some_prompts(), heads=2, **options)
    exact = make is draft_models.make_wide and "store_dtype" not in options
    assert served.drafted * (1 if exact else 0.4) <= served.accepted and served.drafted > 100


def test_a_drafter_with_other_heads_where_queries_choose_nothing(models, tmp_path):
    """The first tokens and the last ones stay: those of the model."""
    model, drafter = models(seed=1), draft_models.make_doubled(tmp_path, models(seed=1))
    options = {"policy": "streamingllm", "budget_tokens": 128, "moment_dtype": "float32"}
    served = with_drafts(model, by("draft_model", drafter), some_prompts(), heads=2, **options)
    assert served.accepted == served.drafted > 100


@pytest.mark.slow
def test_other_heads_and_a_prompt_that_comes_again(models, tmp_path):
    model, drafter = models(seed=1), draft_models.make_wide(tmp_path, models(seed=1))
    options = EVICTION | {"enable_prefix_caching": True, "max_num_seqs": 1}
    served = with_drafts(model, by("draft_model", drafter), [random_prompt(900, seed=5)] * 2, heads=2, **options)
    assert served.tokens[0] == served.tokens[1] and served.cached["r1"] > 700
    assert served.accepted == served.drafted


def test_freed_bytes_are_those_of_all_layers(engine, models, tmp_path):
    """Two layers with two heads of 32 numbers, two with heads of 64."""
    model = models(seed=1)
    e = engine(model, **EVICTION, speculative_config=by("draft_model", draft_models.make_wide(tmp_path, model)))
    assert e.manager.kv_cache_spec.page_bytes == 16 * 4 * 2 * 2 * (2 * 32 + 2 * 64)


def make_beside_windows(folder, method: str):
    """(a model with windows, drafts of it that err as seldom as those of its only layer that counts)"""
    layer = draft_models.make_one_layer(folder / "layer")
    drafter = layer if method == "draft_model" else draft_models.make_eagle(folder / "head", layer)
    return draft_models.make_windowed(folder / "model", layer), by(method, drafter)


@pytest.mark.parametrize("mode", ["chunked", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODES)[1:])])
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_beside_windows(tmp_path, method, mode):
    """Layers with a window have pages of their own; the drafter's lie in the group of those that evict, which is not the first.
    A draft model that errs reads or writes pages of another group."""
    model, drafts = make_beside_windows(tmp_path, method)
    served = with_drafts(model, drafts, some_prompts(), **EVICTION | MODES[mode])
    assert served.drafted * (1 if method == "draft_model" else 0.8) <= served.accepted and served.drafted > 100


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_beside_windows_a_prompt_comes_again(tmp_path, method):
    model, drafts = make_beside_windows(tmp_path, method)
    options = EVICTION | {"enable_prefix_caching": True, "max_num_seqs": 1}
    served = with_drafts(model, drafts, [random_prompt(900, seed=5)] * 2, **options)
    assert served.tokens[0] == served.tokens[1] and served.cached["r1"] > 700
    assert served.accepted >= served.drafted * (1 if method == "draft_model" else 0.8)


@pytest.mark.slow
def test_beside_windows_preemption(tmp_path):
    model, drafts = make_beside_windows(tmp_path, "draft_model")
    prompts = [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240)]
    tight = {"num_gpu_blocks_override": 80, "watermark": 0.0, "enable_prefix_caching": True}
    served = with_drafts(model, drafts, prompts, 220, **EVICTION | tight)
    assert served.preemptions and served.accepted == served.drafted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Granite SWA", "Command A", "Llama 4"])
def test_layers_with_windows_keep_their_tokens(family_model, tmp_path, name, inspected_here):
    """What a drafter writes is in no page of theirs: the model's tokens would be others."""
    drafter = draft_models.make_one_layer(tmp_path)
    served = with_drafts(family_model(name), by("draft_model", drafter), some_prompts(), **EVICTION)
    assert served.accepted < served.drafted


@pytest.mark.slow
def test_eagle3_of_gpt_oss(tmp_path, inspected_here):
    """Windows in every second layer, sinks in all, none in the head's."""
    wide = {"hidden_size": 128, "head_dim": 64}
    model = make_model("GPT-OSS", tmp_path / "model", **layers(*["sliding_attention", "full_attention"] * 4))
    head = draft_models.make_eagle3(tmp_path / "head", draft_models.make_one_layer(tmp_path / "layer", **wide))
    served = with_drafts(model, by("eagle3", head), some_prompts(), **EVICTION)
    assert served.accepted < served.drafted


@pytest.mark.slow
def test_preemption(models):
    model, prompts = models(seed=1), [random_prompt(n, seed=5) for n in (200, 210, 220, 230, 240)]
    tight = {"num_gpu_blocks_override": 80, "watermark": 0.0, "enable_prefix_caching": True}
    served = with_drafts(model, by("draft_model", model), prompts, 220, **EVICTION | tight)
    assert served.preemptions and served.accepted == served.drafted


def test_no_event_is_missed_beside_a_sequence_that_is_full(models):
    """Near --max-model-len vLLM drafts for no row of a batch. The drafter's layers must evict in those steps too."""
    model, prompts = models(seed=1), [random_prompt(n, seed=5) for n in (392, 150, 154, 158, 162)]
    options = EVICTION | MODES["chunked"] | {"max_model_len": 448, "max_num_batched_tokens": 1024}
    served = with_drafts(model, by("draft_model", model), prompts, 160, **options)
    assert served.accepted == served.drafted > 100


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"method": "suffix"}, {}, "only 'ngram', 'draft_model', 'eagle', 'eagle3', 'mtp'"),
        ({"parallel_drafting": True}, {}, "leave parallel_drafting out"),
        ({"model": "other heads"}, {}, "heads have 16 numbers .the model's have 32"),
        ({"model": "windows"}, {}, "and a drafter with sliding-window layers"),
        ({"max_model_len": 512}, {}, "a drafter for 512 tokens, less than --max-model-len 4096"),
        ({"num_speculative_tokens": 15}, {}, "num_speculative_tokens 15 above 14"),
        ({}, {"pipeline_parallel_size": 2}, "and pipeline parallelism"),
        ({}, {"state_folder": "/tmp"}, "kv_eviction.state_folder '/tmp' .a file does not say"),
    ],
)
def test_what_stays_refused(models, family_model, changes, options, words, monkeypatch):
    # The suffix drafter needs a package that is not installed; its absence must not hide our answer.
    monkeypatch.setattr("vllm.config.speculative.SpeculativeConfig._validate_suffix_decoding", lambda self: None)
    drafters = {
        "other heads": models(head_dim=16),
        "other KV heads": models(num_kv_heads=1),
        "windows": family_model("Granite SWA"),
    }
    drafts = {**by("draft_model", models(seed=1), 4), **changes}
    drafts["model"] = str(drafters.get(drafts["model"], drafts["model"]))
    options = dict(options)
    folder = {k: options.pop(k) for k in ("state_folder",) if k in options}
    eviction = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256, **folder}}
    args = EngineArgs(
        model=str(models()), additional_config=eviction, speculative_config=drafts, dtype="float32", max_model_len=4096, **options
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        args.create_engine_config()
