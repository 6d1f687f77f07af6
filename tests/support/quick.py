"""Which cases of a parametrised test `make test` runs; `make test-all` runs them all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(chosen: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """`cases` for parametrize, those not in `chosen` marked slow. Raises ValueError if one of `chosen` is no case."""
    cases = list(cases)
    if gone := [case for case in chosen if case not in cases]:
        raise ValueError(f"{gone} are no cases of this test: {cases}")
    return [case if case in chosen else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
