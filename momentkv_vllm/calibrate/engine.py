"""A real vLLM engine in this process that is asked items: prompts are read, answers decoded token by token."""

import os
from collections.abc import Sequence
from typing import Any

# One process, so that the logits can be handed over; read when vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, EngineArgs, SamplingParams  # noqa: E402
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config  # noqa: E402

from momentkv_vllm.calibrate.forced import ForcedTokens  # noqa: E402
from momentkv_vllm.calibrate.items import Item  # noqa: E402
from momentkv_vllm.calibrate.verdict import Judge  # noqa: E402
from momentkv_vllm.config import CONFIG_KEY  # noqa: E402
from momentkv_vllm.kv_spec import MomentKVSpec  # noqa: E402

SEQUENCES = 8
"""Sequences at a time."""
DEFAULTS = {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": 2048, "seed": 0}


class Engine:
    """options: as `vllm.LLM` takes them."""

    def __init__(self, model: str, **options: Any) -> None:
        self.llm = LLM(model, logits_processors=[ForcedTokens], **{**DEFAULTS, **options})

    def ask(self, items: Sequence[Item], judge: Judge) -> None:
        """Everything about `items` to `judge`. Raises RuntimeError if the engine says anything else."""
        ForcedTokens.judge = judge
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=len(item.answer),
                ignore_eos=True,
                extra_args={"forced": item.answer, "item": number},
            )
            for number, item in enumerate(items)
        ]
        prompts = [{"prompt_token_ids": list(item.prompt)} for item in items]
        for item, said in zip(items, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
            if tuple(said.outputs[0].token_ids) != item.answer:
                raise RuntimeError("the engine did not follow the answer")

    def room(self, tokens: int) -> dict[str, float]:
        """`held_tokens` of a sequence of `tokens` tokens; `sequences` of the longest ones in the KV pool, as vLLM counts them at
        start-up, and the pool's `pool_bytes`."""
        engine = self.llm.llm_engine
        pool = engine.engine_core.engine_core.scheduler.kv_cache_config
        bounds = [
            g.kv_cache_spec.schedule.held_tokens
            for g in pool.kv_cache_groups
            if isinstance(g.kv_cache_spec, MomentKVSpec)
        ]
        return {
            "held_tokens": min([tokens, *bounds]),
            "sequences": get_max_concurrency_for_kv_cache_config(engine.vllm_config, pool),
            "pool_bytes": pool.kv_cache_tensors[0].size,
        }

    def close(self) -> None:
        """Another engine may follow in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()


def arguments(model: str, flags: Sequence[str], context: int, budget: int) -> EngineArgs:
    """What `vllm serve MODEL FLAGS --kv-budget BUDGET` would take, for `context` tokens; budget 0: without eviction.

    Raises SystemExit on flags that vLLM does not know, ValueError on settings that eviction refuses.
    """
    load_general_plugins()
    parser = FlexibleArgumentParser(
        prog="momentkv calibrate",
        usage="momentkv calibrate --model MODEL --texts FILE [OPTIONS] [OPTIONS OF vllm serve]",
    )
    ours = ["--model", model, "--kv-budget", str(budget or 1024), "--max-model-len", str(context)]
    quick = ["--enforce-eager", "--no-enable-prefix-caching", "--no-use-tqdm-on-load"]
    given = EngineArgs.from_cli_args(EngineArgs.add_cli_args(parser).parse_args([*quick, *flags, *ours]))
    if not budget:
        given.additional_config = {k: v for k, v in given.additional_config.items() if k != CONFIG_KEY}
    return given


def start(given: EngineArgs) -> Engine:
    options = {k: v for k, v in vars(given).items() if v is not None and k not in ("model", "logits_processors")}
    return Engine(given.model, **options)
