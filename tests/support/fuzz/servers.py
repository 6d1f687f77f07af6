"""The servers under test: one model, a pool that is small enough for preemptions, every option that requests can use."""

import time
from dataclasses import dataclass
from pathlib import Path

from server import Server
from tiny_models import make_adapter, make_llama

from fuzz.actions import BUDGET, MODEL_LENGTH

OPTIONS = [
    "--dtype", "float32", "--max-model-len", str(MODEL_LENGTH), "--max-num-seqs", "8", "--max-num-batched-tokens", "128",
]  # fmt: skip
POOL_TOKENS = 1920
EVICTING = [
    "--kv-eviction",
    "momentkv",
    "--kv-budget",
    str(BUDGET),
    "--num-gpu-blocks-override",
    str(1 + POOL_TOKENS // 16),
]
STOCK = ["--block-size", "32", "--num-gpu-blocks-override", str(1 + POOL_TOKENS // 32)]
IDLE_SECONDS = 60


@dataclass(frozen=True)
class Profile:
    """Options that requests can use together.

    Attributes:
        options: of both servers.
        evicting: of the evicting one alone.
        without: fields that these options do not take, or that end stock vLLM 0.32.0 with them (the reason stands beside).
    """

    options: tuple[str, ...]
    evicting: tuple[str, ...] = ()
    without: frozenset[str] = frozenset({"model"})


PROFILES = {
    "embeds": Profile(("--enable-prompt-embeds", "--scheduling-policy", "priority")),
    # Prompt logprobs ask punica_cpu.add_lora_logits for more rows than it has indices for: einsum raises in the worker.
    "lora": Profile(
        ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", "adapter={adapter}"),
        without=frozenset({"prompt_logprobs", "echo", "prompt_embeds"}),
    ),
    # top_k of a step without drafts: RejectionSampler takes the maximum of nothing.
    "drafts": Profile(
        ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}'),
        without=frozenset({"model", "prompt_embeds", "top_k"}),
    ),
    "full": Profile((), ("--kv-eviction-config.prefill", "full"), frozenset({"model", "prompt_embeds"})),
}


def start(folder: Path, profile: Profile, evicting: bool) -> Server:
    """Not waited for."""
    adapter = make_adapter(folder / "adapter")
    options = [option.format(adapter=adapter) if "{adapter}" in option else option for option in profile.options]
    options += [*EVICTING, *profile.evicting] if evicting else STOCK
    return Server(make_llama(folder / "model", seed=1), *OPTIONS, *options, folder=folder)


def held_pages(server: Server) -> float:
    """Pages that sequences own when all requests are over; waits for aborted ones to leave. 0 is right."""
    end = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < end:
        usage = server.metrics("vllm:kv_cache_usage_perc")["vllm:kv_cache_usage_perc"]
        held = (
            usage + server.metrics().get("momentkv:live_pages", 0.0) + server.metrics().get("momentkv:sequences", 0.0)
        )
        if not held:
            break
        time.sleep(0.5)
    return held
