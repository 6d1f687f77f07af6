"""The whole campaign: an evicting server and stock vLLM under the same random requests, one profile of options after the other.

Prints and writes build/fuzz/fuzz.json; exit status 1 if the evicting server failed where stock did not.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from fuzz import campaign
from fuzz.campaign import Outcome
from fuzz.servers import PROFILES, Profile, start

FOLDER = Path("build/fuzz")
SCHEMA_PROFILE = "embeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--requests", type=int, default=10_000, help="random requests to each server, over all profiles"
    )
    parser.add_argument(
        "--schema-examples", type=int, default=100, help="schemathesis requests per operation and phase"
    )
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    results, problems = {}, []
    for name in args.profiles:
        requests = -(-args.requests // len(args.profiles))
        examples = args.schema_examples if name == SCHEMA_PROFILE else 0
        results[name], found = compare(name, PROFILES[name], (requests, requests // args.stock_share), examples)
        problems += [f"{name}: {problem}" for problem in found]
        (FOLDER / "fuzz.json").write_text(json.dumps(results | {"problems": problems}, indent=1))
    for problem in problems:
        print(problem[:2000])
    sys.exit(bool(problems))


def compare(name: str, profile: Profile, requests: tuple[int, int], examples: int) -> tuple[dict, list[str]]:
    """Both servers under one profile: their figures, and what the evicting one did worse than stock."""
    folder = (FOLDER / name).resolve()
    folder.mkdir(exist_ok=True)
    ours, outcome = run(folder, profile, True, requests[0], examples)
    ours.stop()
    stock, reference = run(folder, profile, False, requests[1], examples)
    figures = {}
    for label, each in (("momentkv", outcome), ("stock", reference)):
        figures[label] = {"requests": each.requests, "statuses": dict(each.statuses), "problems": each.problems}
        print(name, label, figures[label]["statuses"], *(p[:300] for p in each.problems), flush=True)
    problems = list(outcome.problems)
    if outcome.server_errors and not reference.problems:
        worse = campaign.only_here(stock, outcome.server_errors)
        problems += [f"5xx that stock never answers: {json.dumps(asdict(ask))}" for ask in worse]
    stock.stop()
    return figures, problems


def run(folder: Path, profile: Profile, evicting: bool, requests: int, examples: int) -> tuple:
    """A server, still running, and what it did."""
    server = start(folder, profile, evicting).wait_ready()

    def progress(done: int) -> None:
        print(
            f"\r{folder.name} {'momentkv' if evicting else 'stock'}: {done}/{requests} requests",
            end="",
            file=sys.stderr,
        )

    outcome = campaign.random_bursts(server, requests, profile.without, on_burst=progress)
    print(file=sys.stderr)
    if examples and not outcome.problems:
        schema: Outcome = campaign.of_the_schema(server, folder, examples)
        outcome.problems += schema.problems
        outcome.statuses += schema.statuses
    return server, outcome


if __name__ == "__main__":
    main()
