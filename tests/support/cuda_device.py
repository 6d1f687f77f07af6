"""Runs a kernel family on another device than the tensors of a test: arguments are copied there, what may be written back."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from momentkv_vllm.kernels import KernelFamily
from momentkv_vllm.kernels.cache_view import CacheView
from momentkv_vllm.kernels.observed import Observed


class OnDevice:
    """`family` with its tensors on `device`; to the caller everything happens on the CPU."""

    def __init__(self, family: KernelFamily, device: str) -> None:
        self.family = family
        self.device = device

    def __getattr__(self, name: str):
        def call(*arguments: Any) -> None:
            there = [self._there(x) for x in arguments]
            getattr(self.family, name)(*there)
            for here, moved in zip(arguments, there, strict=True):
                if isinstance(here, CacheView):
                    here.kv.copy_(moved.kv)
                elif isinstance(here, Observed):
                    here.data.copy_(moved.data)
                elif isinstance(here, torch.Tensor):
                    here.copy_(moved)

        return call

    def _there(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self._copy(x)
        if isinstance(x, CacheView):
            d = x.keys.shape[-1]
            kv = self._copy(x.kv)
            return CacheView(kv[..., :d], kv[..., d:], kv, x.raw.to(self.device), x.record_layout)
        if is_dataclass(x):
            return replace(x, **{f.name: self._there(getattr(x, f.name)) for f in fields(x)})
        return x

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        """With the strides of `x`: layouts are what kernels are tested on."""
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        return copy.copy_(x)
