"""Engines of both model runners of vLLM, with our backend of CPUs or with that of CUDA, whose kernels run in Triton's interpreter:
`gpu_engines.py MODEL ENGINE...` prints one JSON object, by engine: what was measured and said.

In a process of its own with TRITON_INTERPRET=1: vLLM's V2 runner is made of Triton kernels, so Triton has to tell vLLM that it serves
CPUs before vLLM is imported.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent))  # -P leaves it out
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

import fake_flash  # noqa: E402
from engine import Engine, random_prompt  # noqa: E402
from measured_heads import capacities, runner_of  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.v1.attention import selector  # noqa: E402
from vllm.v1.worker.cpu_model_runner import _torch_cuda_wrapper  # noqa: E402

from momentkv_vllm.attention import cpu_backend, cuda_backend, cuda_flash  # noqa: E402
from momentkv_vllm.vllm_seams import engine_args  # noqa: E402

SETTINGS = {"policy": "momentkv", "budget_tokens": 128, "max_model_len": 1024}
MEASURED = {"head_budgets": "measured", "key_rounding": "measured", "run_tokens": 8, "store_dtype": "int8"}
KEYS = {"kernels": "reference", "key_rounding": "measured", "store_dtype": "int8"}
PROMPTS = (270, 40, 20)
"""One that is evicted from in chunks, then while it answers, beside two that stay below their budget."""
ENGINES = {
    "v1-cpu": (0, cpu_backend.MomentKVBackend, MEASURED),
    "v2-cpu": (1, cpu_backend.MomentKVBackend, MEASURED),
    "v1-cpu-plain": (0, cpu_backend.MomentKVBackend, {}),
    "v1-cuda-keys": (0, cuda_backend.CudaMomentKVBackend, KEYS),
    "v2-cuda": (1, cuda_backend.CudaMomentKVBackend, MEASURED | {"kernels": "triton"}),
    "v2-flash-plain": (1, cuda_flash.FlashMomentKVBackend, {"kernels": "triton"}),
}
"""By name: model runner, backend, settings."""


def told(name: str, folder: Path) -> dict[str, Any]:
    """What an engine measured, and its tokens."""
    runner, backend, settings = ENGINES[name]
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner)
    cpu_backend.MomentKVBackend = backend  # which the CPU platform asks for
    selector._cached_get_attn_backend.cache_clear()
    e = Engine(folder, **SETTINGS | settings)
    layers = runner_of(e).compilation_config.static_forward_context.values()
    feedback = [x.impl.feedback for x in layers if isinstance(x, Attention)]
    builders = [g.get_metadata_builder() for groups in runner_of(e).attn_groups for g in groups]
    for tokens in PROMPTS:
        e.add(random_prompt(tokens), 6)
    found = {
        "runner": type(runner_of(e)).__module__,
        "builders": [type(b).__module__ for b in builders],
        "capacities": capacities(e),
        "feedback": [None if x is None else x.double().square().sum().item() for x in feedback],
        "tokens": e.run(),
        "flash": len(fake_flash.served),
    }
    e.close()
    return found


def main(model: str, *names: str) -> None:
    engine_args.choose_model_runner = lambda: None
    engine_args.refuse_unsupported = lambda *_: None  # V2 on a CPU
    fake_flash.install()
    with _torch_cuda_wrapper():
        print(json.dumps({name: told(name, Path(model)) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
