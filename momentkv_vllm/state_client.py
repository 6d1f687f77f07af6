"""`momentkv states`: asks a running server to save and load states (state_routes.py)."""

import argparse
import contextlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from momentkv_vllm.refuse import refuse

KEY = "VLLM_API_KEY"
"""The environment variable that `vllm serve` takes an API key from; a key on a command line is seen by all users of a machine."""


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    save = actions.add_parser("save", help="of a text that requests begin with, into the server's state_folder")
    save.add_argument("name", help="of the state: letters, digits, - and _")
    text = save.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="FILE", help="a prompt's beginning, as in /v1/completions")
    text.add_argument("--system", type=Path, metavar="FILE", help="a system prompt, as in /v1/chat/completions")
    text.add_argument("--messages", type=Path, metavar="FILE", help="JSON: the first messages of a chat")
    load = actions.add_parser("load", help="into the server's prefix cache")
    load.add_argument("names", nargs="*", help="of the states; none: all that the server lists")
    every = actions.add_parser("list", help="what is in the server's state_folder")
    for each in (save, load, every):
        each.add_argument(
            "--url", default="http://127.0.0.1:8000", help="of the server; its API key is read from " + KEY
        )
    for each in (save, load):
        each.add_argument("--cache-salt", default="", help="that of the requests that shall find the state")
        each.add_argument("--kv-budget", default="", metavar="NAME", help="their budget class, else the default")


def run(args: argparse.Namespace) -> None:
    """Prints a line of JSON per state. Raises ValueError with the server's refusal."""
    if args.action == "save":
        body = {"name": args.name, **_found_by(args), **_text(args)}
        print(json.dumps(_ask(args.url, "/save", body)))
        return
    listed = _ask(args.url)["states"] if args.action == "list" or not args.names else []
    if args.action == "list":
        for state in listed:
            print(json.dumps(state))
        return
    refusals = []
    for name in args.names or [state["name"] for state in listed if "error" not in state]:
        try:
            print(json.dumps(_ask(args.url, "/load", {"name": name, **_found_by(args)})), flush=True)
        except ValueError as error:  # the next file may fit
            refusals.append(f"{name}: {error}")
    if refusals:
        raise ValueError("\n".join(refusals))


def _found_by(args: argparse.Namespace) -> dict[str, str]:
    return {"cache_salt": args.cache_salt, "kv_budget": args.kv_budget}


def _text(args: argparse.Namespace) -> dict[str, Any]:
    if args.text:
        return {"prompt": args.text.read_text()}
    if args.system:
        return {"messages": [{"role": "system", "content": args.system.read_text()}]}
    return {"messages": json.loads(args.messages.read_text())}


def _ask(url: str, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, '')}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/kv_eviction/states{path}", data, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            refuse(f"{url} has no such endpoint", "serve with VLLM_PLUGINS=momentkv,momentkv_endpoint")
        said = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(said)["error"]
        raise ValueError(f"{said} ({KEY} has no key of this server)" if error.code == 401 else str(said)) from None
    except OSError as error:
        refuse(f"{url} does not answer ({error})", "give --url")
