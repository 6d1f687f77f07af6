"""A patch of vLLM's input processor, where every request of an API server or of Python comes by (ledger: vllm_seams/__init__.py).

It refuses a budget class that there is not, which is the client's error (HTTP 400), and gives the blocks of a request that chose
another class than the default their own hashes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from momentkv_vllm.budget_classes import KV_USAGE, class_number, salted
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.refuse import refuse


def patch_input_processor() -> None:
    """Wrap `process_inputs`; calling it again does nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor.process_inputs, "_momentkv_patched", False):
        return
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        number = class_of_request(self, getattr(params, "extra_args", None), getattr(params, "n", 1))
        request = process(self, request_id, prompt, params, *args, **kwargs)
        request.cache_salt = salted(request.cache_salt, class_names_of(self), number)
        return request

    process_inputs._momentkv_patched = True
    InputProcessor.process_inputs = process_inputs


def class_of_request(processor: Any, extra_args: Mapping[str, Any] | None, answers: int | None) -> int:
    """Number of the class that a request names, by the server's input processor; 0 without eviction. Raises vLLM's ValueError for
    what a client got wrong.

    answers: how many the request asks for, n."""
    from vllm.exceptions import VLLMValidationError

    names, extra_args = class_names_of(processor), extra_args or {}
    if not names:
        return 0
    try:
        if KV_USAGE in extra_args:
            _check_usage(extra_args[KV_USAGE], answers or 1)
        return class_number(names, extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def class_names_of(holder: Any) -> Sequence[str]:
    """Of the classes of an object of vLLM's with a `vllm_config`, which keeps them for the next call; none without eviction."""
    names = getattr(holder, "momentkv_class_names", None)
    if names is None:
        config = EvictionConfig.from_vllm(holder.vllm_config)
        names = holder.momentkv_class_names = config.class_names if config.active else ()
    return names


def _check_usage(asked: Any, answers: int) -> None:
    if asked not in (0, 1):
        refuse(f"{KV_USAGE}={asked!r} is not true or false", "leave it out")
    # vLLM passes on what the engine says of the last of several answers only, and tells its own figures of none of them.
    if asked and answers > 1:
        refuse(f"{KV_USAGE} tells of one answer, and n={answers}", "ask with n=1", f"leave {KV_USAGE} out")
