"""Both model runners of vLLM, V2 being a GPU's, and the CUDA backend under them, in real engines without a GPU (gpu_engines.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from multimodal_models import make_qwen_image_model


def told(folder: Path, *engines: str) -> dict[str, dict]:
    script = Path(__file__).parents[1] / "support/gpu_engines.py"
    command = [sys.executable, "-P", str(script), str(folder), *engines]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def llama(models):
    return told(models(), "v1-cpu", "v2-cpu", "v1-cpu-plain", "v1-cuda-keys", "v2-cuda", "v2-flash-plain")


def assert_measured_alike(v1: dict, v2: dict) -> None:
    assert (v1["runner"], v2["runner"]) == ("vllm.v1.worker.cpu_model_runner", "vllm.v1.worker.cpu.model_runner")
    assert all(v1["feedback"]) and v1["capacities"]
    for key in ("feedback", "capacities", "tokens"):
        assert v1[key] == v2[key], key


def test_what_heads_do_is_measured_alike_under_both_runners(llama):
    assert_measured_alike(llama["v1-cpu"], llama["v2-cpu"])


def test_likewise_where_positions_have_several_numbers_and_inputs_are_embedded(tmp_path):
    assert_measured_alike(*told(make_qwen_image_model(tmp_path), "v1-cpu", "v2-cpu").values())


def test_the_cuda_backend_measures_what_the_cpu_backend_does(llama):
    ours = llama["v1-cuda-keys"]
    assert set(ours["builders"]) == {"momentkv_vllm.attention.cuda_backend"}
    assert ours["feedback"] == llama["v1-cpu"]["feedback"]


@pytest.mark.parametrize(("base", "like"), [("cuda", "v1-cpu"), ("flash-plain", "v1-cpu-plain")])
def test_the_cuda_backend_under_v2_says_what_the_cpu_backend_does(llama, base, like):
    """Chunks, decode steps, rows below their budget beside them; warmed up in the cache that then serves. With the default of a GPU,
    heads and keys measured, and on FlashAttention."""
    ours = llama[f"v2-{base}"]
    assert ours["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert set(ours["builders"]) == {f"momentkv_vllm.attention.cuda_{'backend' if base == 'cuda' else 'flash'}"}
    assert bool(ours["flash"]) is (base != "cuda")
    for key in ("tokens", "capacities", "feedback"):
        assert ours[key] == llama[like][key], key
    assert {name: len(tokens) for name, tokens in ours["tokens"].items()} == {"r0": 6, "r1": 6, "r2": 6}
