"""Mixed traffic of one server: right requests, aborted, disconnected, oversized and malformed ones, and bursts."""

import asyncio
import collections
import contextlib
import json
import random
from typing import Any

import aiohttp
from soak.catalog import Request

CLIENTS = 6
BURST = 24
BURST_SECONDS = 20.0

KINDS = {"plain": 30, "stream": 30, "abort": 14, "disconnect": 6, "sampled": 6, "malformed": 10, "oversized": 4}
"""Kind of a request and its weight."""

MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b"\xff\xfe\x00"),
    ("/v1/completions", b"[]"),
    ("/v1/completions", b"{}"),
    ("/v1/chat/completions", json.dumps({"model": "soak", "messages": "hello"}).encode()),
    ("/v1/chat/completions", json.dumps({"model": "other", "messages": [{"role": "user", "content": "a"}]}).encode()),
    ("/v1/nothing", b"{}"),
    *(
        ("/v1/completions", json.dumps({"model": "soak", "prompt": "t001 t002", **wrong}).encode())
        for wrong in (
            {"max_tokens": -1},
            {"max_tokens": "many"},
            {"temperature": -3},
            {"temperature": 1e400},
            {"n": 0},
            {"n": 10**6},
            {"prompt": [1, 2, 10**6]},
            {"prompt": [[]]},
            {"logprobs": 10**6},
            {"top_p": 7},
            {"stop": 5},
            {"logit_bias": {"9999999": 1}},
        )
    ),
]
"""Path and body; every one must be answered with 4xx and a message."""

OVERSIZED: list[bytes] = [
    json.dumps({"model": "soak", "prompt": "t001 " * 5000}).encode(),
    json.dumps({"model": "soak", "prompt": "t001", "max_tokens": 10**9}).encode(),
    json.dumps({"model": "soak", "prompt": "t001 " * 10**6}).encode(),
]


class Traffic:
    """Counts what happened. `faulty`: a fault is being injected, so connections may break and 5xx is an answer."""

    def __init__(self, requests: list[Request], seed: int = 0) -> None:
        self.requests = requests
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.faulty = False
        self._url = ""

    async def run(self, url: str, seconds: float) -> None:
        """CLIENTS clients at a time, and a burst every BURST_SECONDS, until the time is over; then all answers are in."""
        self._url = url
        end = asyncio.get_running_loop().time() + seconds
        limit = aiohttp.ClientTimeout(total=600)
        # A new connection each: uvicorn closes idle ones after 5 s, at times just when a client takes one up again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
            await asyncio.gather(self._bursts(session, end), *(self._client(session, end) for _ in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, end: float) -> None:
        while asyncio.get_running_loop().time() < end:
            (kind,) = self.rng.choices(list(KINDS), KINDS.values())
            broken = not await self._one(session, kind)
            # A server that is down answers at once.
            await asyncio.sleep(0.5 if broken else self.rng.random() * 0.2)

    async def _bursts(self, session: aiohttp.ClientSession, end: float) -> None:
        while asyncio.get_running_loop().time() + 1 < end:
            await asyncio.gather(*(self._one(session, self.rng.choice(("plain", "stream"))) for _ in range(BURST)))
            self.counts["bursts"] += 1
            await asyncio.sleep(min(BURST_SECONDS, max(0.0, end - asyncio.get_running_loop().time())))

    async def _one(self, session: aiohttp.ClientSession, kind: str) -> bool:
        """One request of a kind; False if the server could not be reached or failed."""
        try:
            await getattr(self, f"_{kind}")(session)
            self.counts[kind] += 1
            return True
        except (aiohttp.ClientError, TimeoutError, ServerFailed) as error:
            self.counts["failed in a fault" if self.faulty else "failed"] += 1
            if not self.faulty:
                self.problems.append(f"{kind}: {type(error).__name__}: {error}")
            return False

    def _check(self, request: Request, tokens: list[int], complete: bool = True) -> None:
        verdict = request.compare(tokens, complete)
        self.counts[verdict] += 1
        self.counts["compared tokens"] += len(tokens)
        if verdict == "wrong":
            self.problems.append(f"wrong tokens, {len(tokens)} of {request.max_tokens}: {request.prompt[-80:]}")

    async def _post(self, session: aiohttp.ClientSession, body: Any) -> Any:
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise ServerFailed(f"HTTP {answer.status} {text[:200]}")
            return json.loads(text)

    async def _plain(self, session: aiohttp.ClientSession) -> None:
        request = self.rng.choice(self.requests)
        answer = await self._post(session, request.body())
        self._check(request, answer["choices"][0]["token_ids"])

    async def _sampled(self, session: aiohttp.ClientSession) -> None:
        """Two samples that evict apart: nothing to compare, but they come complete."""
        request = self.rng.choice(self.requests)
        answer = await self._post(session, request.body(temperature=0.9, n=2))
        if [len(c["token_ids"]) for c in answer["choices"]] != [request.max_tokens] * 2:
            self.problems.append("a sample is not complete")

    async def _stream(self, session: aiohttp.ClientSession, stop_after: int | None = None) -> None:
        request = self.rng.choice(self.requests)
        tokens: list[int] = []
        async with session.post(f"{self._url}/v1/completions", json=request.body(stream=True)) as answer:
            if answer.status != 200:
                raise ServerFailed(f"HTTP {answer.status} {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServerFailed(str(event["error"])[:200])
                tokens += event["choices"][0].get("token_ids") or []
                if stop_after is not None and len(tokens) >= stop_after:
                    # Leaving the block closes the connection in the middle of the answer.
                    break
        self._check(request, tokens, complete=stop_after is None)

    async def _abort(self, session: aiohttp.ClientSession) -> None:
        """The client reads a few tokens and goes away."""
        await self._stream(session, self.rng.randrange(1, 20))

    async def _disconnect(self, session: aiohttp.ClientSession) -> None:
        """The client goes away before any answer: while waiting, in prefill or in decode."""
        task = asyncio.create_task(self._plain(session))
        await asyncio.wait({task}, timeout=self.rng.random() * 0.5)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _malformed(self, session: aiohttp.ClientSession) -> None:
        await self._refused(session, *self.rng.choice(MALFORMED))

    async def _oversized(self, session: aiohttp.ClientSession) -> None:
        await self._refused(session, "/v1/completions", self.rng.choice(OVERSIZED))

    async def _refused(self, session: aiohttp.ClientSession, path: str, body: bytes) -> None:
        """Bad input: 4xx, with a message."""
        headers = {"Content-Type": "application/json"}
        async with session.post(self._url + path, data=body, headers=headers) as answer:
            text = await answer.text()
        self.counts[f"HTTP {answer.status}"] += 1
        if self.faulty and answer.status >= 500:
            raise ServerFailed(f"HTTP {answer.status}")
        if not 400 <= answer.status < 500 or not text.strip():
            self.problems.append(f"bad input answered with {answer.status} {text[:200]!r}: {path} {body[:120]!r}")


class ServerFailed(Exception):
    """An answer that is not one: 5xx, or an error in a stream."""
