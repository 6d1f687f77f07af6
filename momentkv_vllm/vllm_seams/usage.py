"""Patches of vLLM's chat and completion handlers: what a response's sequence held and evicted goes into its usage block, if the
request asked for it with `vllm_xargs: {"kv_eviction_usage": true}` (ledger: vllm_seams/__init__.py).

A streamed response begins before vLLM has looked at its request. What a client got wrong about ours is refused here, with
a status of its own (HTTP 400).

Our scheduler sends what was held with a request's last output, in the field that vLLM has for what a cache says of a request
(`kv_transfer_params`; connectors, whose it is, are refused). Handlers copy that field into responses that are not streamed only.
"""

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from momentkv_vllm.budget_classes import KV_USAGE
from momentkv_vllm.budget_classes import USAGE_FIELD as FIELD
from momentkv_vllm.vllm_seams.requests import class_of_request


def patch_usage() -> None:
    """Wrap four methods; calling it again does nothing."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    if getattr(OpenAIServingChat, "_momentkv_patched", False):
        return
    chat, completion = OpenAIServingChat, OpenAIServingCompletion
    stream, full = chat.chat_completion_stream_generator, chat.chat_completion_full_generator
    OpenAIServingChat.chat_completion_stream_generator = _checked(_where_asked(stream, _streams))
    OpenAIServingChat.chat_completion_full_generator = _where_asked(full, _answers_chat)
    stream, full = completion.completion_stream_generator, completion.request_output_to_completion_response
    OpenAIServingCompletion.completion_stream_generator = _checked(_where_asked(stream, _streams))
    OpenAIServingCompletion.request_output_to_completion_response = _where_asked(full, _answers_completion)
    OpenAIServingChat._momentkv_patched = True


def _checked(method: Callable) -> Callable:
    """`method` of a handler, which raises vLLM's ValueError at once for a wrong request."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        class_of_request(self.input_processor, request.vllm_xargs, request.n)
        return method(self, request, *args, **kwargs)

    return wrapped


def _where_asked(method: Callable, answer: Callable[[Callable, dict[str, Any]], Any]) -> Callable:
    """`method`, or answer(method, its arguments by name) where the request asks for usage."""
    names = list(inspect.signature(method).parameters)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        asks = (given["request"].vllm_xargs or {}).get(KV_USAGE)
        return answer(method, given) if asks else method(*args, **kwargs)

    return wrapped


class Noted:
    """What the engine said of a response's sequences, summed as usage is over the prompts of a request."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    async def of(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Passes on what the engine yields, and notes it."""
        async for output in outputs:
            self.note(output[1] if isinstance(output, tuple) else output)
            yield output

    def note(self, output: Any) -> None:
        for key, value in (output.kv_transfer_params or {}).get(FIELD, {}).items():
            self.said[key] = value if isinstance(value, str) else self.said.get(key, 0) + value

    def put_into(self, response: Any) -> Any:
        """The same response, or error."""
        if self.said and getattr(response, "usage", None):
            response.kv_transfer_params = None
            setattr(response.usage, FIELD, self.said)
        return response


async def _streams(method: Callable, given: dict[str, Any]) -> AsyncIterator[str]:
    noted = Noted()
    async for event in method(**given | {"result_generator": noted.of(given["result_generator"])}):
        yield _with_usage(event, noted.said)


async def _answers_chat(method: Callable, given: dict[str, Any]) -> Any:
    noted = Noted()
    return noted.put_into(await method(**given | {"result_generator": noted.of(given["result_generator"])}))


def _answers_completion(method: Callable, given: dict[str, Any]) -> Any:
    noted = Noted()
    for output in given["final_res_batch"]:
        noted.note(output)
    return noted.put_into(method(**given))


def _with_usage(event: str, said: dict[str, Any]) -> str:
    """A server-sent event; the one that ends with the usage block of the whole response gets ours."""
    if not said or '"usage"' not in event or not event.startswith("data: {"):
        return event
    chunk = json.loads(event.removeprefix("data: "))
    if chunk.get("choices") or not chunk.get("usage"):
        return event
    chunk["usage"][FIELD] = said
    return f"data: {json.dumps(chunk)}\n\n"
