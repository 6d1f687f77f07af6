"""Which attention of vLLM's serves sequences below their budget on a GPU: FlashAttention, as in stock vLLM, or else Triton's."""

from typing import ClassVar

from vllm.logger import init_logger

from momentkv_vllm.attention.cuda_backend import CudaEvictingBackend, CudaMomentKVBackend

logger = init_logger(f"vllm.{__name__}")


class CudaChoice(CudaMomentKVBackend):
    """Registered at AttentionBackendEnum.CUSTOM; serves nothing itself.

    vLLM asks a backend that was chosen by name whether it can serve a layer, and then for its own name, which it looks up
    (vllm/platforms/cuda.py, get_attn_backend_cls, vLLM 0.32.0): we name the one that can.
    """

    chosen: ClassVar[type[CudaEvictingBackend]] = CudaMomentKVBackend
    """Of the layer that was asked about last: a mailbox between these two calls."""

    @classmethod
    def validate_configuration(cls, *layer, **kwargs) -> list[str]:
        """No reasons if one of the two can serve the layer, else those of both."""
        found = {}
        for name, backend in cls._backends().items():
            reasons = backend if isinstance(backend, list) else backend.validate_configuration(*layer, **kwargs)
            if not reasons:
                CudaChoice.chosen = backend
                without = "".join(f"; not {other}: {', '.join(why)}" for other, why in found.items())
                logger.info_once("--kv-eviction: vLLM's %s serves sequences below their budget%s", name, without)
                return []
            found[name] = reasons
        return list(dict.fromkeys(reason for reasons in found.values() for reason in reasons))

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return cls.chosen.full_cls_name()

    @staticmethod
    def _backends() -> dict[str, type[CudaEvictingBackend] | list[str]]:
        """By vLLM's name, the one that is preferred first; or why it is not there."""
        try:
            from momentkv_vllm.attention.cuda_flash import FlashMomentKVBackend as flash
        except (ImportError, OSError) as error:
            flash = [f"{type(error).__name__}: {error}"]
        return {"FlashAttention": flash, "Triton attention": CudaMomentKVBackend}
