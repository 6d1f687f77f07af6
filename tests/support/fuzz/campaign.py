"""A number of requests to one server, judged: it lives, its answers stay right, and it gives every page back."""

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from server import Server

from fuzz import client
from fuzz.actions import Ask, bursts
from fuzz.servers import held_pages

SCHEMATHESIS = [
    "--checks", "not_a_server_error", "--phases", "examples,fuzzing", "--exclude-path-regex", "scale_elastic_ep",
    "--request-timeout", "120", "--continue-on-failure", "--no-color",
]  # fmt: skip


@dataclass
class Outcome:
    """What one server did.

    Attributes:
        statuses: how often each status was answered; 0: the client left, -1: the connection broke.
        server_errors: requests answered with 5xx, or not at all.
        problems: why the server failed the campaign.
    """

    statuses: collections.Counter = field(default_factory=collections.Counter)
    server_errors: list[Ask] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.statuses.total()


def random_bursts(
    server: Server,
    requests: int,
    without: frozenset[str],
    start: int = 0,
    on_burst: Callable[[int], None] = lambda n: None,
) -> Outcome:
    """At least `requests` requests in bursts drawn by hypothesis from seed `start` on; the first problem ends it.

    without: fields that no request has.
    """
    outcome = Outcome()
    want = client.canaries(server)

    def fire(burst: list[Ask]) -> None:
        if outcome.problems:
            return
        for ask, status in zip(burst, client.send(server.url, burst), strict=True):
            outcome.statuses[status] += 1
            if status >= 500 or status == client.BROKEN:
                outcome.server_errors.append(ask)
        if not client.healthy(server):
            outcome.problems.append("the engine is dead after " + json.dumps([asdict(a) for a in burst]))
        on_burst(outcome.requests)

    while outcome.requests < requests and not outcome.problems:
        _draw(fire, bursts(without), start)
        start += 1
        if not outcome.problems and client.canaries(server) != want:
            outcome.problems.append(f"other tokens for the same prompt after the bursts of seed {start - 1}")
    if not outcome.problems and (held := held_pages(server)):
        outcome.problems.append(f"{held} pages, sequences or share of the pool still held when all requests are over")
    return outcome


def only_here(server: Server, asks: list[Ask], times: int = 20) -> list[Ask]:
    """Which of `asks`, all answered with 5xx elsewhere, this server always answers otherwise. Sampling may decide it."""
    distinct = {json.dumps(asdict(ask)): ask for ask in asks}.values()
    kept = [Ask(ask.path, ask.body) for ask in distinct]
    return [ask for ask in kept if all(0 < status < 500 for status in client.send(server.url, [ask] * times))]


def _draw(function: Callable[[list[Ask]], None], strategy: SearchStrategy, number: int, examples: int = 50) -> None:
    """Run a function on `examples` draws of seed `number`. Nothing is shrunk: a server has a state."""
    once = settings(
        max_examples=examples, phases=[Phase.generate], deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    seed(number)(once(given(strategy)(function)))()


def of_the_schema(server: Server, folder: Path, examples: int) -> Outcome:
    """schemathesis over the server's own OpenAPI document, at most `examples` requests per operation and phase."""
    outcome, report = Outcome(), folder / f"schemathesis-{server.port}.ndjson"
    command = [str(Path(sys.executable).parent / "st"), "run", f"{server.url}/openapi.json", *SCHEMATHESIS]
    command += ["--max-examples", str(examples), "--seed", "1"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
    hooks = {"SCHEMATHESIS_HOOKS": "fuzz.schema_hooks", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=folder, env=os.environ | hooks, capture_output=True, text=True, check=False)
    (folder / f"schemathesis-{server.port}.log").write_text(done.stdout + done.stderr)
    outcome.statuses.update(_statuses(report))
    if not client.healthy(server):
        outcome.problems.append("the engine is dead after schemathesis")
    return outcome


def _statuses(report: Path) -> Iterator[int]:
    """Status of every answer in a report of schemathesis; BROKEN where none came."""
    for line in report.read_text().splitlines():
        recorded = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for interaction in recorded.get("interactions", {}).values():
            yield (interaction["response"] or {}).get("status_code", client.BROKEN)
