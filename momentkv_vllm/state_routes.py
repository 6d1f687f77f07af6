"""`/kv_eviction/states` on the API server: states in files, listed, saved and loaded. Part of endpoint.py's plugin.

Off without --kv-eviction-config.state_folder; and never without --api-key: a file holds a text, and loading one changes what the
prefix cache says of it.
"""

import uuid
from http import HTTPStatus
from itertools import takewhile
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from vllm import SamplingParams
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

from momentkv_vllm import state_file
from momentkv_vllm.budget_classes import KV_BUDGET
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.refuse import refuse

PATH = "/kv_eviction/states"


class StateToLoad(BaseModel):
    """cache_salt, kv_budget: those of the requests that shall find it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    cache_salt: str = ""
    kv_budget: str = ""


class StateToSave(StateToLoad):
    """Of a text as in /v1/completions, or of messages as in /v1/chat/completions, that later requests begin with."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


def state_routes(keys: list[str], guard: Any) -> APIRouter:
    """keys: the server's API keys; guard: vLLM's AuthenticationMiddleware, which knows them."""
    router = APIRouter()

    def refusal(request: Request) -> JSONResponse | None:
        if not _folder(request):
            return _error("this server keeps no states in files; serve with --kv-eviction-config.state_folder")
        if not keys:
            return _error("states in files need an API key; serve with --api-key", HTTPStatus.FORBIDDEN)
        return None if guard.verify_token(request.headers) else _error("Unauthorized", HTTPStatus.UNAUTHORIZED)

    @router.get(PATH)
    async def states(request: Request) -> JSONResponse:
        return refusal(request) or JSONResponse({"states": list(state_file.listed(_folder(request)))})

    @router.post(f"{PATH}/save")
    async def save(body: StateToSave, request: Request) -> JSONResponse:
        if no := refusal(request):
            return no
        try:
            tokens = await _tokens_of(body, request)
            await _read(request.app.state.momentkv_engine, tokens, body)
            return await _ask_engines(request, "save", body, tokens)
        except ValueError as error:
            return _error(str(error))

    @router.post(f"{PATH}/load")
    async def load(body: StateToLoad, request: Request) -> JSONResponse:
        return refusal(request) or await _ask_engines(request, "load", body, [])

    return router


async def _ask_engines(request: Request, action: str, body: StateToLoad, tokens: list[int]) -> JSONResponse:
    """Every data-parallel engine; the first one's answer."""
    core = request.app.state.momentkv_engine.engine_core
    answers = await core.call_utility_all_async(
        "kv_eviction_states", action, body.name, tokens, body.cache_salt, body.kv_budget
    )
    errors = [answer["error"] for answer in answers if "error" in answer]
    return _error(errors[0]) if errors else JSONResponse(next(answer for answer in answers if answer))


async def _read(engine: Any, tokens: list[int], body: StateToSave) -> None:
    """Have the first engine read the text, so that its last state is in the prefix cache; what is there already is not read."""
    prompt = {"prompt_token_ids": tokens} | ({"cache_salt": body.cache_salt} if body.cache_salt else {})
    parallel = engine.vllm_config.parallel_config
    first = {"data_parallel_rank": 0} if parallel.data_parallel_size > 1 else {}
    chosen = {KV_BUDGET: body.kv_budget} if body.kv_budget else None
    settings = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=chosen)
    async for _ in engine.generate(prompt, settings, f"kv-state-{uuid.uuid4()}", **first):
        pass


async def _tokens_of(body: StateToSave, request: Request) -> list[int]:
    """Tokens that every request over the same text or messages begins with. Raises ValueError on what has none."""
    if (body.prompt is None) == (body.messages is None):
        refuse("a state is that of a prompt or of messages", "give one of them")
    if body.prompt is not None:
        # What follows a text can change its last token.
        return (await _tokenized(TokenizeCompletionRequest(prompt=body.prompt), request))[:-1]
    # A template closes the last message: what two continuations have in common is what stays.
    role = "assistant" if body.messages and body.messages[-1].get("role") == "user" else "user"
    goes_on = [
        TokenizeChatRequest(messages=[*body.messages, {"role": role, "content": content}], add_generation_prompt=False)
        for content in ("a", "1")
    ]
    one, other = [await _tokenized(each, request) for each in goes_on]
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


async def _tokenized(asked: Any, request: Request) -> list[int]:
    answer = await request.app.state.serving_tokenization.create_tokenize(asked, request)
    if not hasattr(answer, "tokens"):
        raise ValueError(answer.error.message)
    return answer.tokens


def _folder(request: Request) -> str | None:
    return EvictionConfig.from_vllm(request.app.state.momentkv_engine.vllm_config).state_folder


def _error(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> JSONResponse:
    return JSONResponse({"error": message}, status)
