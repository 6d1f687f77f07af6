"""Every GPU family against the float32 reference: no figure without a right answer."""

import math

import torch
from cases import Case, Shape
from shape import SINKS

from momentkv_vllm.kernels import FAMILIES, select
from momentkv_vllm.policies import find

POLICY, reference = find("momentkv")(), select("reference")
SHAPES = [
    *(
        Shape(head_dim=d, groups=g, dtype=t, rows=9, slots=700, odd=True)
        for d in (64, 128)
        for g in (1, 4, 8)
        for t in (torch.bfloat16, torch.float16)
    ),
    *(Shape(rows=rows, odd=True) for rows in (1, 64, 256)),
    *(Shape(slots=slots, rows=4, odd=True) for slots in (17, 256, 4096, 8192)),
    *(Shape(page_size=p, rows=5, odd=True) for p in (32, 64, 128)),
    *(Shape(record=r, rows=5, odd=True) for r in ("int8", "float32", "zeroth")),
    *(Shape(queries=q, groups=g, rows=4, odd=True) for q in (7, 33, 128) for g in (1, 4, 7)),
    Shape(head_dim=256, rows=3, odd=True, record="zeroth"),
    Shape(head_dim=80, groups=5, rows=3, odd=True),
    Shape(head_dim=96, rows=3, odd=True, dtype=torch.float32, record="float32"),
]
TINY = [
    Shape(head_dim=32, kv_heads=1, groups=2, slots=70, rows=2, odd=True, dtype=torch.float32),
    Shape(head_dim=32, kv_heads=1, groups=2, slots=70, rows=2, queries=5, odd=True),
]
SANITIZED = [Shape(head_dim=64, kv_heads=1, groups=4, slots=150, rows=3, odd=True, queries=q) for q in (1, 5)]
# A tile's probabilities are rounded to the cache's type before they meet the values, as in every flash attention.
ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}


def named(name: str):
    return next(family for family in FAMILIES if family.name == name)


def families() -> dict:
    """The GPU families that work here, by name, also those that must be named."""
    native = [family for family in FAMILIES if family.devices == ("cuda",)]
    found = {family.name: family for family in native if not family.objections()}
    if not found:
        raise SystemExit(f"no GPU kernel family works here: {[family.objections() for family in native]}")
    return found


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> float:
    """Largest difference relative to the largest number. Raises AssertionError with the place."""
    assert not got.isnan().any(), f"{what}: NaN at {got.isnan().nonzero()[0].tolist()}"
    difference = (got.float() - want.float()).abs()
    relative = (difference.max() / want.float().abs().max().clamp(min=1e-20)).item()
    place = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert relative <= tolerance, f"{what}: {relative:.2e} > {tolerance:.2e} at {place}"
    return relative


def check(shape: Shape, name: str, family, device: str) -> dict:
    """Attend (with and without correction), observe, consolidate, write of one shape; twice each for equal bits."""
    case, tolerance = Case(shape, device), ROUNDING[shape.dtype]
    worst = 0.0
    for corrected in (False, True):
        case.attend(reference, corrected, lse=True)
        want, want_lse = case.output.clone(), case.lse.clone()
        seen = []
        for _ in range(2):
            case.output.fill_(math.nan), case.lse.fill_(math.nan)
            case.attend(family, corrected, lse=True)
            seen.append((case.output.clone(), case.lse.clone()))
        label = f"{name}, {shape.label}, corrected={corrected}"
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), f"{label}: two runs differ"
        worst = max(worst, close(case.output, want, tolerance, f"{label}, output"))
        close(case.lse, want_lse, max(1e-4, tolerance / 8), f"{label}, logsumexp")
    twin = case.twin()
    for each, kernels in ((case, family), (twin, reference)):
        kernels.observe(each.cache, each.mass, each.query, want_lse, each.work, each.scale)
    close(case.mass.data[case.pages], twin.mass.data[case.pages], tolerance, f"{name}, {shape.label}, observe")
    if case.pages.shape[1] >= 5 and shape.queries == 1:
        check_retire(case, twin, name, family)
    return {"family": name, "shape": shape.label, "worst_relative_difference": worst}


def check_retire(case: Case, twin: Case, name: str, family) -> None:
    """The same tokens in the same slots, the same record. Scores of the two agree to rounding, so ties may fall apart:
    the reference's scores decide for both."""
    shape, label = case.shape, f"{name}, {case.shape.label}, consolidate"
    work = case.retire_work(2)
    twin.mass.data.copy_(case.mass.data)
    family.consolidate(case.cache, case.mass, work, POLICY, SINKS, case.scale)
    reference.consolidate(twin.cache, twin.mass, work, POLICY, SINKS, case.scale)
    got, want = case.cache.read_tokens(work.store_pages), twin.cache.read_tokens(work.store_pages)
    moved = (got[0] != want[0]).any(-1).float().mean().item()
    assert moved <= 2 / got[0].shape[2], f"{label}: {moved:.1%} of the store's slots hold other tokens"
    if moved == 0:
        after = torch.ones_like(work.num_evicted)
        got, want = (c.cache.read_moments(work.moment_pages, after) for c in (case, twin))
        close(got.mean_key, want.mean_key, 1e-3, f"{label}, mean key")
        close(got.mean_value, want.mean_value, 1e-3, f"{label}, mean value")
        if shape.layout.has_covariance:
            close(got.covariance, want.covariance, 2e-2, f"{label}, covariance")
    idle = case.cache.kv.clone()
    family.consolidate(case.cache, case.mass, case.retire_work(2, due=False), POLICY, SINKS, case.scale)
    same = torch.equal(idle.view(torch.uint8), case.cache.kv.view(torch.uint8))
    assert same, f"{label}: a row without an event was changed"
    slots = work.store_pages[:, 0] * shape.page_size + 1
    family.write(case.cache, case.key, case.value, slots, case.mass)
    assert torch.equal(case.cache.keys[work.store_pages[:, 0], :, 1], case.key), f"{label}: write"
