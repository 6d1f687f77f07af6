"""What else vLLM can be told to run in the place of what our hooks are in: another model runner, worker, front end, or pages that
mean something else. With it a server would run without eviction, or with wrong tokens, and say nothing. All of it is refused."""

import logging
import os
from typing import TYPE_CHECKING, Any

from momentkv_vllm.refuse import WITHOUT, Unsupported, refuse
from momentkv_vllm.vllm_seams.gpu import BACKEND_NAMES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable. Unset, vLLM takes its V2 model runner where Triton works, on a CPU as well (VllmConfig.use_v2_model_runner,
0.32.0 and 0.33.0). No option says it, and every worker asks the variable for itself."""
RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"
LEAVE_OUT = "leave the option out"

_chosen_here = False
"""Whether V2_RUNNER has its value from us."""


def choose_model_runner() -> None:
    """On a CPU, have this process and its workers take vLLM's V1 model runner, whose methods we patch, unless the user chose.
    Raises ValueError if that is V2. On CUDA no patch of a model runner is needed."""
    import vllm.envs as envs
    from vllm.platforms import current_platform

    global _chosen_here
    if not current_platform.is_cpu():
        return
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        refuse(
            f"--kv-eviction does not support {V2_RUNNER}=1 on a CPU (only 0: eviction is in vLLM's V1 model runner)",
            f"unset it or set {V2_RUNNER}=0", WITHOUT,
        )  # fmt: skip
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        _chosen_here, os.environ[V2_RUNNER] = True, "0"
        logger.info("momentkv: %s not given, using 0", V2_RUNNER)


def leave_model_runner_to_vllm() -> None:
    """Take back what `choose_model_runner` chose: the next engine of this process does not evict."""
    global _chosen_here
    if _chosen_here:
        os.environ.pop(V2_RUNNER, None)
    _chosen_here = False


def bypass_rows(vllm_config: "VllmConfig", platform: Any, backend: Any) -> list[Unsupported]:
    """What eviction cannot serve of how vLLM runs a model. backend: the attention backend that the user named, if any."""
    return [*_runner_rows(vllm_config, platform, backend), *_meaning_rows(vllm_config)]


def _runner_rows(vllm_config: "VllmConfig", platform: Any, backend: Any) -> list[Unsupported]:
    parallel, kinds = vllm_config.parallel_config, ", ".join(vllm_config.attention_config.backend_per_kind)
    # A CPU has one backend, whatever a model's hook in vLLM writes here (Gemma 4's: models/config.py); only the user is obeyed.
    attention = backend if platform.is_cpu() else vllm_config.attention_config.backend
    return [
        Unsupported(
            f"--attention-backend {getattr(attention, 'name', attention)}",
            attention is not None and attention.name != BACKEND_NAMES.get(platform.device_type),
            LEAVE_OUT,
        ),
        Unsupported(
            "--watermark-config on a CPU (it wants vLLM's V2 model runner, and eviction is in V1)",
            platform.is_cpu() and vllm_config.watermark_config,
            LEAVE_OUT,
        ),
        Unsupported(
            f"vLLM's V2 model runner on a CPU ({V2_RUNNER} is {os.environ.get(V2_RUNNER)}; eviction is in V1)",
            platform.is_cpu() and vllm_config.use_v2_model_runner,
            f"set {V2_RUNNER}=0 before Python starts",
        ),
        Unsupported(
            f"--worker-cls {parallel.worker_cls} (another worker may have another model runner)",
            not _is_vllms_worker(parallel.worker_cls, platform),
            f"{LEAVE_OUT}, derive it from vLLM's",
        ),
        Unsupported(f"--attention-config.backend_per_kind of {kinds}", kinds, LEAVE_OUT),
        Unsupported(
            f"microbatches (--enable-dbo, --ubatch-size {parallel.ubatch_size}): a step's evictions are planned for all of it",
            parallel.use_ubatching,
            "leave both out",
        ),
        Unsupported(
            f"{RUST_FRONTEND}=1 (requests go round what checks them)",
            os.environ.get(RUST_FRONTEND, "0") not in ("", "0"),
            f"unset {RUST_FRONTEND}",
        ),
    ]


def _meaning_rows(vllm_config: "VllmConfig") -> list[Unsupported]:
    """Where tokens, pages or hashes would mean something else than the page schedule says."""
    cache = vllm_config.cache_config
    unit = cache.prefix_match_unit
    return [
        Unsupported(
            "--mm-encoder-only and --ec-transfer-config of a producer (no layer has a KV cache)",
            vllm_config.is_mm_encoder_only,
            LEAVE_OUT,
        ),
        Unsupported(
            "--enable-return-routed-experts (they are found by a token's page, which others may have by then)",
            vllm_config.aux_output_config.enabled,
            LEAVE_OUT,
        ),
        Unsupported(
            "--attention-config.use_non_causal (evicted tokens are the past of all others)",
            vllm_config.attention_config.use_non_causal,
            LEAVE_OUT,
        ),
        Unsupported(
            f"--prefix-match-unit {unit}, other than the page size of {cache.block_size}",
            unit not in (None, cache.block_size),
            LEAVE_OUT,
        ),
    ]


def _is_vllms_worker(name: str, platform: Any) -> bool:
    """Whether vLLM's worker of this platform, or one that derives from it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    ours = "vllm.v1.worker.cpu_worker.CPUWorker" if platform.is_cpu() else "vllm.v1.worker.gpu_worker.Worker"
    return name in ("auto", ours) or issubclass(resolve_obj_by_qualname(name), resolve_obj_by_qualname(ours))
