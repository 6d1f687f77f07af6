"""Two workers: tensor- and pipeline-parallel ranks never exchange a message about eviction and agree by construction; data-parallel
engines evict each on their own."""

import concurrent.futures
import json
import os
import subprocess
import sys

import openai
import pytest
from engine import Engine, random_prompt
from safetensors import safe_open
from server import Server

from momentkv_vllm.metrics import read_metrics
from momentkv_vllm.state_file import HEADER

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
]

PROMPTS = [random_prompt(n) for n in (30, 700, 1200)] + [random_prompt(700)[:600] + random_prompt(90)]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from momentkv_vllm.metrics import read_metrics

def asked(prompts, **options):
    llm = LLM(**options, max_model_len=4096, max_num_batched_tokens=256, dtype="float32", num_gpu_blocks_override=200)

    def ask(some, names=("base",) * len(prompts)):
        settings = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args={"kv_budget": name})
                    for _, name in zip(some, names)]
        outputs = llm.generate([{"prompt_token_ids": p} for p in some], settings, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]

    tokens, _ = ask(prompts)
    metrics = read_metrics()
    again = ask(prompts)
    states = llm.llm_engine.engine_core.engine_core.kv_eviction_states
    said = [states("save", "text", prompts[2], "")]
    assert llm.reset_prefix_cache()
    said.append(states("load", "text", [], ""))
    loaded = ask(prompts[2:3])
    both = ask(2 * prompts, ["base"] * len(prompts) + ["small"] * len(prompts))[0]
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "metrics": metrics, "again": again, "said": said, "loaded": loaded, "both": both}

if __name__ == "__main__":
    prompts, engines = map(json.loads, sys.argv[1:])
    print("RESULT", json.dumps([asked(prompts, **options) for options in engines]))
"""


def evicting(folder, heads: str) -> dict:
    return {
        "policy": "momentkv",
        "budgets": "base=384,small=160",
        "moment_dtype": "float32",
        "state_folder": str(folder),
        "head_budgets": heads,
        "key_rounding": "nearest",
    }


def results_of(folders: dict, model, binding: str, **options) -> dict[str, dict]:
    """What SCRIPT asks of an engine with equal and one with measured heads, one after the other; `folders` of their states."""
    script = folders["equal"].with_suffix(".py")
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # The engine in the script's process: workers have theirs, and every process takes seven seconds to import vLLM.
    env |= {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engines = [
        {"model": str(model), **options, "additional_config": {"kv_eviction": evicting(folder, heads)}}
        for heads, folder in folders.items()
    ]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(PROMPTS), json.dumps(engines)],
        capture_output=True,
        text=True,
        cwd=script.parent,
        env=env,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    return dict(zip(folders, json.loads(lines[0].removeprefix("RESULT ")), strict=True))


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, models):
    """What SCRIPT asks, asked of an engine in this process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
        e = Engine(models(seed=1), enable_prefix_caching=True, num_gpu_blocks_override=200, store_dtype="auto",
                   **evicting(folder, "equal"))  # fmt: skip
        try:
            return asked_of(e)
        finally:
            e.close()


def asked_of(e: Engine) -> dict:
    states = e.vllm.engine_core.engine_core.kv_eviction_states

    def ask(some, names=None):
        names = names or ["base"] * len(some)
        asked = [e.add(p, 24, extra_args={"kv_budget": name}) for p, name in zip(some, names, strict=True)]
        tokens = e.run()
        return [tokens[name] for name in asked], [e.cached_tokens[name] for name in asked]

    tokens, _ = ask(PROMPTS)
    metrics, again = read_metrics(), ask(PROMPTS)
    said = [states("save", "text", PROMPTS[2], "")]
    assert e.vllm.reset_prefix_cache()
    said.append(states("load", "text", [], ""))
    loaded = list(ask(PROMPTS[2:3]))
    both, _ = ask(2 * PROMPTS, ["base"] * len(PROMPTS) + ["small"] * len(PROMPTS))
    return {"tokens": tokens, "metrics": metrics, "again": again, "said": said, "loaded": loaded, "both": both}


@pytest.fixture(scope="module")
def one_compiled_worker(tmp_path_factory, models):
    """Compiled code rounds otherwise: a number at the edge of a step of the store may fall to the other side, and a token follow."""
    return results_of({"equal": tmp_path_factory.mktemp("one")}, models(seed=1), "0", enforce_eager=False)["equal"]


@pytest.fixture(
    scope="module", params=["tensor_parallel_size", pytest.param("pipeline_parallel_size", marks=pytest.mark.slow)]
)
def two_ranks(request, tmp_path_factory, models):
    """(whether tensor parallel, folders of states by heads, results by heads)"""
    folders = {heads: tmp_path_factory.mktemp(heads) for heads in ("equal", "measured")}
    eager = request.param == "tensor_parallel_size"
    return eager, folders, results_of(folders, models(seed=1), "0|1", enforce_eager=eager, **{request.param: 2})


def test_two_ranks_give_the_tokens_and_metrics_of_one(two_ranks, request):
    """Counted once, although both ranks consolidate; the same bytes, although each holds half of them."""
    eager, folders, two = two_ranks
    two = two["equal"]
    one_worker = request.getfixturevalue("one_worker" if eager else "one_compiled_worker")
    assert two["tokens"] == one_worker["tokens"]
    for name in ("retired_pages_total", "evicted_tokens_total", "freed_bytes_total"):
        assert two["metrics"][f"momentkv:{name}"] == one_worker["metrics"][f"momentkv:{name}"] > 0, name
    # Classes in one batch; the workers know a row's without a message.
    assert two["both"] == one_worker["both"] and two["both"][: len(PROMPTS)] == one_worker["tokens"]
    assert two["both"][len(PROMPTS) :] != one_worker["tokens"], "the classes answer alike: the test proves nothing"
    # From states: kept by every worker, and from a file of each.
    for run in (one_worker, two):
        assert run["again"][0] == one_worker["tokens"] and min(run["again"][1][1:]) > 384
        assert [said["tokens"] for said in run["said"]] == [1184, 1184]
        assert run["loaded"] == [[one_worker["tokens"][2]], [1184]]
    assert sorted(path.name for path in folders["equal"].glob("*.safetensors")) == [
        "text.1-of-2.safetensors", "text.2-of-2.safetensors"
    ]  # fmt: skip
    # How many sequences evict together depends on when requests arrive; two writers would double the count.
    timed = [each["metrics"]["momentkv:consolidate_seconds_count"] for each in (one_worker, two)]
    assert 0 < timed[1] < 1.5 * timed[0]


def test_every_rank_measures_its_own_heads(two_ranks, one_worker):
    """Heads share with those of their rank and stage; a state's file of each says what they hold."""
    eager, folders, two = two_ranks
    two = two["measured"]
    # A stage has one layer here, whose heads differ by so little that these answers need not.
    assert not eager or two["tokens"] != one_worker["tokens"], "what heads hold must matter here"
    assert two["tokens"] == two["again"][0] == two["both"][: len(PROMPTS)] and min(two["again"][1][1:]) > 384
    assert two["loaded"] == [[two["tokens"][2]], [1184]]
    held = []
    for path in sorted(folders["measured"].glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.append(json.loads(file.metadata()[HEADER])["tokens_of_heads"])
    if eager:
        assert held[0].keys() == held[1].keys() and held[0] != held[1]
    else:
        assert not held[0].keys() & held[1].keys()
    totals = [sum(map(sum, of.values())) / sum(map(len, of.values())) for of in held]
    assert totals[0] == totals[1], "the same bytes on every rank"
    # A tensor-parallel rank has one head of each layer, and the first one may not take from the second.
    assert any(len(set(sum(of.values(), []))) > 1 for of in held)


@pytest.mark.slow
@pytest.mark.server
def test_two_data_parallel_engines_give_the_tokens_of_one(tmp_path, models, one_worker):
    eviction = ["--kv-eviction", "momentkv", "--kv-budget", "384", "--kv-eviction-config.moment_dtype", "float32",
                "--kv-eviction-config.head_budgets", "equal", "--kv-eviction-config.key_rounding", "nearest"]  # fmt: skip
    pool = ["--num-gpu-blocks-override", "200", "--max-num-batched-tokens", "256", "--max-model-len", "4096"]
    server = Server(
        models(seed=1), *eviction, *pool, "--dtype", "float32", "--data-parallel-size", "2", "--return-tokens-as-token-ids",
        folder=tmp_path, binding="0|1",
    )  # fmt: skip
    try:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def ask(prompt):
            more = {"ignore_eos": True}
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=24, temperature=0, logprobs=1, extra_body=more
            )
            return [int(t.removeprefix("token_id:")) for t in answer.choices[0].logprobs.tokens]

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, 2 * PROMPTS)) == 2 * one_worker["tokens"]
        retired = [s.rsplit(" ", 1) for s in server.samples() if s.startswith("momentkv:retired_pages_total")]
        assert sorted(name.split('engine="')[1][0] for name, _ in retired) == ["0", "1"]
        assert all(float(value) > 0 for _, value in retired), "both engines must have evicted"
        timed = [s for s in server.samples() if s.startswith("momentkv:consolidate_seconds_count")]
        assert len(timed) == 2 and all(float(s.rsplit(" ", 1)[1]) > 0 for s in timed), "each engine's worker reports"
    finally:
        server.stop()
