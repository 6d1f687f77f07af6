"""Sends bursts of requests to a server and says what became of each."""

import asyncio
import contextlib
import json
import urllib.request

import aiohttp
from engine import random_prompt
from server import Server

from fuzz.actions import BUDGET, Ask

SECONDS = 120.0
LEFT, BROKEN = 0, -1
"""In place of a status: the client left; the connection broke, or no answer came in SECONDS."""

CANARIES = [random_prompt(n, seed=77) for n in (30, BUDGET - 1, BUDGET + 1, 3 * BUDGET)]


def send(url: str, burst: list[Ask]) -> list[int]:
    """Status of every answer, in order."""
    return asyncio.run(_send(url, burst))


async def _send(url: str, burst: list[Ask]) -> list[int]:
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True)) as session:
        return list(await asyncio.gather(*(_one(session, url, ask) for ask in burst)))


async def _one(session: aiohttp.ClientSession, url: str, ask: Ask) -> int:
    await asyncio.sleep(ask.wait)
    try:
        return await asyncio.wait_for(_answer(session, url, ask), ask.leave)
    except TimeoutError:
        return BROKEN if ask.leave is None else LEFT
    except aiohttp.ClientError:
        return BROKEN


async def _answer(session: aiohttp.ClientSession, url: str, ask: Ask) -> int:
    # allow_nan: a client can send it, and json.loads of the server takes it.
    headers = {"Content-Type": "application/json"}
    async with session.post(url + ask.path, data=json.dumps(ask.body), headers=headers) as response:
        text = await response.text()
    # An error after the first streamed piece has no status of its own.
    if ask.body.get("stream") and response.status == 200 and '"error"' in text and '"code": 5' in text:
        return 500
    return response.status


def canaries(server: Server) -> list[list[int]]:
    """Greedy tokens of four prompts below and above the budget: the same as long as no request changed another's pages."""
    answers = []
    for prompt in CANARIES:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        data = json.dumps(body | {"return_token_ids": True}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            answers.append(json.load(response)["choices"][0]["token_ids"])
    return answers


def healthy(server: Server) -> bool:
    """The engine lives and answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(server.url + "/health", timeout=SECONDS) as response:
        return response.status == 200
    return False
