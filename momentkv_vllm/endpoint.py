"""`GET /kv_eviction` on the API server: configuration, page schedule, totals, health; and states in files (state_routes.py).

Entry point `vllm.endpoint_plugins`.

Opt-in, as vLLM wants for anything that adds a route: VLLM_PLUGINS=momentkv,momentkv_endpoint. The answer holds numbers and the
names of our own options, nothing of requests, files or the environment, and not the model's name, which may be a path.
"""

from argparse import Namespace
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import vllm.envs as envs
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kv_spec import expected_schedules
from momentkv_vllm.metrics import read_metrics
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.state_routes import state_routes

PATH = "/kv_eviction"


class KVEvictionEndpoint:
    """vLLM's protocol EndpointPlugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "momentkv_endpoint"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        # vLLM's middleware asks for the key under /v1 and a few other prefixes only.
        keys = [key for key in (app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        guard = AuthenticationMiddleware(app, keys) if keys else None

        @app.get(PATH)
        async def kv_eviction(request: Request) -> JSONResponse:
            if guard and not guard.verify_token(request.headers):
                return JSONResponse({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
            engine: EngineClient = request.app.state.momentkv_engine
            healthy = await _is_healthy(engine)
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            return JSONResponse({**summary(engine.vllm_config), "healthy": healthy, "totals": read_metrics()}, status)

        app.include_router(state_routes(keys, guard))

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        state.momentkv_engine = engine_client


def summary(vllm_config: Any) -> dict[str, Any]:
    """`config` (keys as in docs/settings.md) and, with eviction on, `schedule` (pages, and the token counts of events) of
    the default class, and of each in `classes`."""
    config = EvictionConfig.from_vllm(vllm_config)
    shown = config.to_dict() | {"state_folder": "set" if config.state_folder else None}
    found: dict[str, Any] = {"active": config.active, "config": shown}
    if config.active:
        schedules = expected_schedules(config, vllm_config)
        found["schedule"] = _told(schedules[0])
        found["classes"] = {name: _told(s) for name, s in zip(config.class_names, schedules, strict=True)}
    return found


def _told(schedule: PageSchedule) -> dict[str, Any]:
    sizes = {
        "budget_pages": schedule.budget_pages,
        "first_event": schedule.first_event_tokens if schedule.evicts else None,
        "retire_tokens": schedule.retire_tokens,
        "store_tokens": schedule.store_tokens,
        "held_tokens": schedule.held_tokens,
    }
    return {**asdict(schedule), **sizes}


async def _is_healthy(engine: EngineClient) -> bool:
    """vLLM's own health check raises on a dead engine, whose message may name paths: only its verdict leaves."""
    try:
        await engine.check_health()
    except Exception:
        return False
    return True
