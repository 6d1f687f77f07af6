"""The engine keeps the tokens that NVIDIA's kvpress keeps: same model, same prompt, `full` prefill.

kvpress runs where `tests/oracle/record.sh` has made its environment (.venv-oracle); elsewhere its recorded scores are used.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.page_layout import RecordLayout

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "benchmarks/test_model/checkpoint"
PYTHON = ROOT / ".venv-oracle/bin/python"
RECORDED = ROOT / "tests/data/kvpress_scores.safetensors"
PAGE, CANDIDATES, WINDOW, KEPT = 16, 512, 32, 128

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Token ids and kvpress's scores per policy, [layers, kv_heads, tokens]."""
    if not PYTHON.exists():
        return load_file(RECORDED)
    out = tmp_path_factory.mktemp("kvpress") / "scores.safetensors"
    subprocess.run([PYTHON, ROOT / "tests/oracle/record_kvpress.py", CHECKPOINT, out], check=True)
    return load_file(out)


@pytest.fixture(scope="module")
def keys(oracle):
    """[layers, kv_heads, tokens, head_dim] of the prompt, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        cache = model(oracle["ids"][None]).past_key_values
    return torch.stack([layer.keys[0] for layer in cache.layers])


def kept_positions(e, prompt, keys, pages):
    """Positions of the tokens in the given columns of the sequence's block table, [layers, kv_heads, tokens]."""
    name = e.add(prompt, max_tokens=4)
    while not any(o.outputs[0].token_ids for o in e.step()):
        pass
    (blocks,) = (b for n, b in e.manager.req_to_blocks.items() if n.startswith(name))
    numbers = torch.tensor([[blocks[i].block_id for i in pages]])
    runner = e.vllm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    found = []
    for layer, cache in enumerate(runner.kv_caches):
        empty = RecordLayout(keys.shape[-1], has_means=False, has_covariance=False)
        stored, _ = CacheView.of_vllm_cpu(cache, empty).read_tokens(numbers)
        distance = torch.cdist(stored[0], keys[layer], compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(-1).max() < 1e-2, "every stored key is one of the prompt's"
        found.append(distance.argmin(-1))
    e.run()
    return torch.stack(found)


def schedule_of(e):
    return e.manager.kv_cache_spec.schedule


@pytest.mark.parametrize("policy", ["knorm", "keydiff", "snapkv"])
def test_the_same_tokens_stay(engine, oracle, keys, policy):
    e = engine(
        CHECKPOINT, policy=policy, budget_tokens=KEPT + WINDOW + PAGE, window_tokens=WINDOW, sink_tokens=0, prefill="full",
        observation_tokens=WINDOW, correction="off", block_size=PAGE, max_num_batched_tokens=1024,
    )  # fmt: skip
    assert schedule_of(e).store_tokens == KEPT
    assert schedule_of(e).boundary_column(CANDIDATES + WINDOW, CANDIDATES + WINDOW) * PAGE == CANDIDATES
    ours = kept_positions(e, oracle["ids"].tolist(), keys, range(KEPT // PAGE))
    for layer, heads in enumerate(oracle[policy]):
        for head, score in enumerate(heads):
            want = set(score.topk(KEPT).indices.tolist())
            have = set(ours[layer, head].tolist())
            assert len(have) == KEPT
            # Scores equal up to rounding may change places; nothing else may.
            edge = score.topk(KEPT).values[-1]
            for token in want ^ have:
                assert abs(score[token] - edge) <= 1e-4 * abs(edge), (layer, head, token)


def test_streamingllm_differs_by_the_rest_of_the_first_page(engine, oracle, keys):
    """kvpress keeps 4 sinks and 171 recent tokens. We keep the whole page that holds the sinks, hence 12 recent tokens fewer,
    and between two events the window is up to a page short of the budget.
    """
    tokens = CANDIDATES + WINDOW
    budget = 176
    e = engine(CHECKPOINT, policy="streamingllm", budget_tokens=budget, sink_tokens=4, prefill="full", block_size=PAGE)
    boundary = schedule_of(e).boundary_column(tokens, tokens)
    ours = kept_positions(e, oracle["ids"].tolist(), keys, [0, *range(boundary, tokens // PAGE)])
    for layer in range(len(ours)):
        for head in range(ours.shape[1]):
            have = set(ours[layer, head].tolist())
            want = set(oracle["streamingllm"][layer, head].nonzero().flatten().tolist())
            assert have - want == set(range(4, 16))
            assert want - have == {t for t in want if 4 <= t < boundary * PAGE}
            assert len(want - have) <= 12 + PAGE
