"""The worker's part in states that are kept in files: pages to bytes and back."""

from typing import Any

import torch
from torch import Tensor

from momentkv_vllm import state_file
from momentkv_vllm.state_file import TOKENS, Header


class StatePages:
    """vLLM adds it to its worker (--worker-extension-cls, set by vllm_seams/engine_args.py if states may be kept in files).

    The engine core calls these methods between two steps (block_manager/state_transfer.py). What a user can mend comes back as
    {"error": text}: an exception in a worker says no more than that there was one.
    """

    def save_kv_state(
        self, folder: str, name: str, number: int, header: Header, tokens: list[int], pages: list[list[int]]
    ) -> Header:
        """Write this worker's part of a state of a budget class; `pages`: by KV cache group, in the order of the columns."""
        tensors = {layer: _bytes(cache[pages[group]]) for layer, (group, cache) in self._kv_state_caches().items()}
        tensors[TOKENS] = torch.tensor(tokens, dtype=torch.int32)
        try:
            path = self._kv_state_path(folder, name)
            return {"bytes": state_file.write(path, header | self._kv_state_header(number), tensors)}
        except (OSError, ValueError) as error:
            return {"error": str(error)}

    def open_kv_state(self, folder: str, name: str, number: int, expected: Header) -> Header:
        """Read and check this worker's part, and keep it for `write_kv_state`; its header, with "token_ids" from the first."""
        shapes = {layer: list(_bytes(cache[:1]).shape[1:]) for layer, (_, cache) in self._kv_state_caches().items()}
        try:
            header, tensors = state_file.read(
                self._kv_state_path(folder, name), expected | self._kv_state_header(number), shapes
            )
            tokens = tensors.pop(TOKENS).tolist()
            for layer, (group, _) in self._kv_state_caches().items():
                if len(tensors[layer]) != len(header["columns"][group]):
                    raise ValueError(f"state {name} has not as many pages as its header says; save it again")
        except (OSError, ValueError) as error:
            return {"error": str(error)}
        except (KeyError, IndexError, TypeError):
            return {"error": f"state {name} is damaged: its header is no state's; save it again"}
        self._kv_state_opened = tensors
        return header | {"token_ids": tokens}

    def write_kv_state(self, pages: list[list[int]]) -> None:
        """Put what was opened into `pages`, by KV cache group. Every step in flight was sent to this worker before."""
        opened = self._kv_state_opened
        for layer, (group, cache) in self._kv_state_caches().items():
            part = opened[layer].view(cache.dtype).view(-1, *cache.shape[1:])
            cache[pages[group]] = part.to(cache.device)
        self._kv_state_opened = None

    def _kv_state_path(self, folder: str, name: str) -> Any:
        return state_file.path_of(folder, name, self.rank, self.vllm_config.parallel_config.world_size)

    def _kv_state_header(self, number: int) -> Header:
        """What this worker's part depends on: heads with budgets of their own have their tiles where others would not look."""
        layers = self.model_runner.compilation_config.static_forward_context
        heads = {name: getattr(getattr(layer, "impl", None), "heads", ()) for name, layer in layers.items()}
        held = {name: tables[number].capacity.tolist() for name, tables in heads.items() if tables and tables[number]}
        return {"rank": self.rank, "ranks": self.vllm_config.parallel_config.world_size, "tokens_of_heads": held}

    def _kv_state_caches(self) -> dict[str, tuple[int, Tensor]]:
        """By layer with a cache of its own: its KV cache group, and its cache with the pool's pages in front."""
        config, layers = self.model_runner.kv_cache_config, self.model_runner.compilation_config.static_forward_context
        found = {}
        for group, spec in enumerate(config.kv_cache_groups):
            for layer in spec.layer_names:
                if layer in layers and getattr(layers[layer], "kv_sharing_target_layer_name", None) is None:
                    cache = layers[layer].kv_cache
                    cache = cache if isinstance(cache, Tensor) else cache[0]
                    found[layer] = group, cache.unflatten(0, (config.num_blocks, -1))
        return found


def _bytes(pages: Tensor) -> Tensor:
    """[pages, bytes of a page] of any tensor with pages in front."""
    return pages.cpu().contiguous().flatten(1).view(torch.uint8)
