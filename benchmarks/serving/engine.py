"""vLLM's engine in this process, stepped by hand. Import it in a child: it sets vLLM's environment."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from typing import Any  # noqa: E402  after the environment is set

from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402


def start(model: str, eviction: dict[str, Any] | None, **options: Any) -> LLMEngine:
    """Token ids in, token ids out. eviction: None for stock vLLM."""
    if eviction:
        options["additional_config"] = {"kv_eviction": eviction}
    return LLMEngine.from_engine_args(
        EngineArgs(model=model, skip_tokenizer_init=True, **{"enforce_eager": True} | options)
    )


def add(engine: LLMEngine, name: str, prompt: list[int], new_tokens: int) -> None:
    """A greedy request of exactly `new_tokens`."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
