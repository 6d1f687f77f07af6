"""Moments as the bytes of a record and back, one record per KV head; page_layout.py says where the parts lie."""

import torch
from torch import Tensor

from momentkv_vllm.moments import Moments, per_head
from momentkv_vllm.page_layout import RecordLayout


def covariance_dtype(layout: RecordLayout) -> torch.dtype:
    return getattr(torch, layout.moment_dtype)


def decoded(raw: Tensor, layout: RecordLayout, num_evicted: Tensor) -> Moments:
    """Moments in float32 of records [rows, heads, bytes] uint8; `num_evicted` [rows], or [rows, heads], comes from the
    schedule.

    Heads that evicted nothing give zeros, whatever their bytes are. So do parts that the layout lacks.
    """
    rows, heads, _ = raw.shape
    at, d = layout.offsets, layout.head_dim
    if not layout.has_means:
        zeros = torch.zeros(rows, heads, d, device=raw.device)
        return Moments(num_evicted, zeros, zeros, zeros[..., 0], None)
    raw = torch.where(per_head(num_evicted == 0), raw.new_zeros(()), raw)

    def part(start: int, numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return raw[..., start : start + numbers * dtype.itemsize].contiguous().view(dtype)

    covariance = None
    if layout.has_covariance:
        covariance = part(at.covariance, d * d, covariance_dtype(layout)).view(rows, heads, d, d).float()
        if layout.has_scales:
            covariance = covariance * part(at.scales, d).unsqueeze(-1)
    means = part(at.mean_key, d), part(at.mean_value, d)
    return Moments(num_evicted, *means, part(at.spread, 1)[..., 0], covariance)


def encode(moments: Moments, layout: RecordLayout, record: Tensor) -> None:
    """Write moments into records [rows, heads, bytes] uint8; what the layout does not use stays."""

    def put(start: int, numbers: Tensor) -> None:
        part = numbers.contiguous().view(torch.uint8)
        record[..., start : start + part.shape[-1]] = part

    at, covariance = layout.offsets, moments.covariance
    put(at.mean_key, moments.mean_key)
    put(at.mean_value, moments.mean_value)
    put(at.spread, moments.value_spread.unsqueeze(-1))
    if layout.has_covariance and covariance is not None:
        if layout.has_scales:
            scales = covariance.abs().amax(-1) / 127
            covariance = (covariance / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
            put(at.scales, scales)
        put(at.covariance, covariance.flatten(2).to(covariance_dtype(layout)))
