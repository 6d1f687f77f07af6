"""Layers that keep states beside layers that evict, in the real engine: tokens do not depend on how requests are scheduled."""

import pytest
from engine import random_prompt
from model_families import make_model
from vllm.model_executor.models import registry

from momentkv_vllm.page_schedule import cdiv

BUDGET = 256
EVICT = {"policy": "momentkv", "budget_tokens": BUDGET, "max_model_len": 2048}
PROMPTS = [random_prompt(n, seed=3) for n in (90, 700, 1100)]


@pytest.fixture(autouse=True)
def inspected_here(monkeypatch):
    """vLLM asks another process what a model class can do, lest CUDA be initialised; here that is only slow."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    return make_model("Granite 4 hybrid", tmp_path_factory.mktemp("granite") / "m")


@pytest.mark.engine
def test_tokens_do_not_depend_on_scheduling(engine, granite):
    """Alone, together in small chunks, several samples of a prompt, and preempted: blocks change hands between states, pages of
    tokens and rewritten pages."""
    alone = [engine(granite, **EVICT).generate([p], 24)[0] for p in PROMPTS[:1]]
    e = engine(granite, **EVICT, max_num_batched_tokens=512)
    alone = [e.generate([p], 24)[0] for p in PROMPTS]
    fine = engine(granite, **EVICT, max_num_batched_tokens=64)
    assert fine.generate(PROMPTS, 24) == alone
    blocks = cdiv(BUDGET + 64, fine.manager.block_size) + 2
    assert fine.manager.blocks.pages > 1 and max(fine.peak_pages.values()) <= blocks < 1100 // fine.manager.block_size
