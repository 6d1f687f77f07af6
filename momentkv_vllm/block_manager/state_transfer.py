"""States in files: from the prefix cache, and into it. Runs in the engine core, between two steps.

The workers hold the bytes and write a file each (attention/state_pages.py); here is decided which pages they are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id, resolve_block_hashes
from vllm.v1.request import Request

import momentkv_vllm
from momentkv_vllm.budget_classes import KV_BUDGET, class_number, salted
from momentkv_vllm.fp8 import kv_numbers
from momentkv_vllm.model_identity import model_identity
from momentkv_vllm.refuse import refuse
from momentkv_vllm.state_file import FORMAT, Header, token_hash
from momentkv_vllm.versions import installed_vllm

Rows = Sequence[Sequence[KVCacheBlock]]
"""Pages by KV cache group and column."""
NO_TOKEN = 0
"""Stands behind a text: a request starts before its last token at the latest, and only the text's own tokens are hashed."""


class StateTransfer:
    """Those of one budget class of an engine.

    scheduler: ours. call_workers: EngineCore.collective_rpc. hasher: of vLLM's block hashes, which differ from start to start.
    number: of the class, which keeps states.
    """

    def __init__(
        self, vllm_config: Any, scheduler: Any, call_workers: Callable, hasher: Callable, number: int = 0
    ) -> None:
        self.scheduler, self.call, self.hasher, self.books = (
            scheduler,
            call_workers,
            hasher,
            scheduler.evicting.books[number],
        )
        self.states, self.schedule = self.books.states, self.books.schedule
        self.managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.spec, self.folder = scheduler.evicting.kv_cache_spec, scheduler.evicting.kv_cache_spec.config.state_folder
        # A class's states are those of a server with its budget alone.
        config, model = self.books.served.config.to_dict(), vllm_config.model_config
        self.identity: Header = {
            "format": FORMAT,
            "momentkv": momentkv_vllm.__version__,
            "vllm": installed_vllm(),
            "model": model_identity(model),
            "dtype": _dtype(vllm_config),
            "page_tokens": [manager.block_size for manager in self.managers],
            "kv_eviction": {key: value for key, value in config.items() if not key.startswith("state_")},
        }

    def save(self, name: str, tokens: list[int], salt: str | None) -> Header:
        """Write the latest state of a text that is in the prefix cache. Raises ValueError if there is none, and with what the
        workers refuse."""
        start = time.perf_counter()
        event, rows = next(self._hits(self._request(tokens, salt)), (0, ()))
        if not event:
            refuse(
                f"these {len(tokens)} tokens have no state: nothing is evicted of texts below "
                f"{self.schedule.first_event_tokens} tokens, nor of prompts that prefill {self.spec.config.prefill!r} "
                f"reads exactly",
                "save a longer text",
                "serve with prefill 'chunked'",
            )
        header = {
            **self.identity,
            "model_name": self.spec.model_name,
            "tokens": event,
            "token_hash": token_hash(tokens[:event]),
            "columns": [[column for column, page in enumerate(row) if not page.is_null] for row in rows],
        }
        pages = [[page.block_id for page in row if not page.is_null] for row in rows]
        done = self._call("save_kv_state", self.folder, name, self.books.number, header, tokens[:event], pages)
        return self._said(name, event, start) | {"bytes": sum(part["bytes"] for part in done)}

    def load(self, name: str, salt: str | None) -> Header:
        """Put a file's state into the prefix cache. Raises ValueError with what the workers refuse, and if too few pages are
        free."""
        start = time.perf_counter()
        header = self._call("open_kv_state", self.folder, name, self.books.number, self.identity)[0]
        tokens, event = header["token_ids"], header["tokens"]
        # As if more text followed: a text that prefill "auto" reads exactly finds no state.
        request = self._request(tokens, salt, behind=1 + max(0, self.schedule.exact_prompt_tokens - len(tokens)))
        self._check(name, header, tokens)
        found, _ = next(self._hits(request), (0, ()))
        if found < event:
            self._fill(request, event, header["columns"])
            found, _ = next(self._hits(request), (0, ()))
        if found < event:
            refuse(f"state {name} lacks pages that this server's layers need", "save it again here")
        return self._said(name, event, start)

    def _request(self, tokens: list[int], salt: str | None, behind: int = 1) -> Request:
        """A text's, with so many tokens behind it."""
        text, settings = [*tokens, *[NO_TOKEN] * behind], SamplingParams(max_tokens=1)
        salt = salted(salt, self.spec.config.class_names, self.books.number)
        return Request("kv-state", text, settings, None, cache_salt=salt, block_hasher=self.hasher)

    def _hits(self, request: Request) -> Iterator[tuple[int, Rows]]:
        """The request's states, the latest first, with the pages of all groups."""
        for event, row in self.states.hits(request, after=0):
            rows = self.scheduler._rows_of_all_groups(request, event, row)
            if rows:
                yield event, rows

    def _check(self, name: str, header: Header, tokens: list[int]) -> None:
        event, schedule = header["tokens"], self.schedule
        if (
            token_hash(tokens) != header["token_hash"]
            or len(tokens) != event
            or schedule.last_common_event(event, event) != event
        ):
            refuse(f"state {name} is damaged: its tokens are not those of its header", "save it again")
        size, kept = schedule.page_size, range(self.states.state_pages)
        wanted = [*kept, *range(schedule.boundary_column(event), event // size)]
        legal = len(header["columns"]) == len(self.managers)
        for manager, columns in zip(self.managers, header["columns"], strict=legal):
            ours = manager.kv_cache_group_id == self.states.group_id
            legal &= columns == wanted if ours else set(columns) <= set(range(event // manager.block_size))
        if not legal:
            refuse(f"state {name} is damaged: it has pages in other places than its header says", "save it again")

    def _fill(self, request: Request, event: int, columns: list[list[int]]) -> None:
        """Take free pages, have the workers fill them, and leave them in the prefix cache."""
        pool, needed = self.states.pool, sum(map(len, columns))
        if needed > pool.get_num_free_blocks():
            refuse(
                f"the state needs {needed} pages, {pool.get_num_free_blocks()} are free",
                "load it when fewer requests run",
                "give the KV cache more memory",
            )
        taken = pool.get_new_blocks(needed)
        try:
            rest = iter(taken)
            rows = [[next(rest) for _ in group] for group in columns]
            self._call("write_kv_state", [[page.block_id for page in row] for row in rows])
            for group, row in enumerate(rows):
                self._name(request, event, group, columns[group], row)
        finally:
            # In reverse: of pages freed together vLLM takes the first ones first, and a state is worth nothing without its own.
            pool.free_blocks(reversed(taken))
        self.states.remember(request, end=event)
        self.scheduler.evicting.metrics.states_held(self.scheduler.evicting.states_held())

    def _name(self, request: Request, event: int, group: int, columns: list[int], row: list[KVCacheBlock]) -> None:
        """Give pages the keys by which a request finds them."""
        size, own = self.managers[group].block_size, self.states.state_pages
        if group == self.states.group_id:
            self.states.hold(request, event, row[:own])
            row, keys = row[own:], self.states.window_keys(request, event)
        else:
            hashes = resolve_block_hashes(request.block_hashes, self.states.pool.hash_block_size, size)
            keys = ((column, make_block_hash_with_group_id(hashes[column], group)) for column in columns)
        for page, (column, key) in zip(row, keys, strict=True):
            self.states.insert(page, key, (column + 1) * size)

    def _call(self, method: str, *args: Any) -> list[Any]:
        found = self.call(method, args=args)
        for rank, part in enumerate(found):
            if part and part.get("error"):
                raise ValueError(part["error"] if len(found) == 1 else f"worker {rank}: {part['error']}")
        return found

    def _said(self, name: str, event: int, start: float) -> Header:
        return {"name": name, "tokens": event, "seconds": round(time.perf_counter() - start, 3)}


def _dtype(vllm_config: Any) -> str:
    """Of the model, and of its cache where that is another one."""
    dtypes = dict.fromkeys((vllm_config.model_config.dtype, kv_numbers(vllm_config)))
    return " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def class_with_states(scheduler: Any, name: str) -> int | None:
    """Number of the budget class of that name, "": the default; None if the engine keeps no states of it, or may keep none in
    files. Raises ValueError if there is none."""
    evicting = getattr(scheduler, "evicting", None)
    if evicting is None:
        return None
    config = evicting.kv_cache_spec.config
    number = class_number(config.class_names, {KV_BUDGET: name} if name else None)
    return number if config.state_folder and evicting.books[number].states else None
