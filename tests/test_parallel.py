"""Tensor parallel 2: ranks never exchange a message about eviction, and agree by construction."""

import json
import os
import subprocess
import sys

import pytest
from engine import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    options = json.loads(sys.argv[1])
    llm = LLM(**options, enforce_eager=True, max_model_len=4096, max_num_batched_tokens=256, dtype="float32",
              num_gpu_blocks_override=200,
              additional_config={"kv_eviction": {"policy": "momentkv", "budget_tokens": 384, "moment_dtype": "float32"}})
    prompts = [{"prompt_token_ids": p} for p in json.loads(sys.argv[2])]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))

if __name__ == "__main__":
    main()
"""


def tokens_of(folder, model, ranks: int, binding: str) -> list[list[int]]:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_ENABLE_V1_MULTIPROCESSING")}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": binding}
    prompts = json.dumps([random_prompt(n) for n in (30, 700, 1200)])
    options = json.dumps({"model": str(model), "tensor_parallel_size": ranks})
    done = subprocess.run(
        [sys.executable, str(script), options, prompts], capture_output=True, text=True, cwd=folder, env=env
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOKENS "))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_ranks_give_the_tokens_of_one(tmp_path, models):
    model = models(seed=1)
    assert tokens_of(tmp_path, model, 2, "0|1") == tokens_of(tmp_path, model, 1, "0")
