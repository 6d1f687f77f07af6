"""How we say no: what is not supported, with its value, and at least one way out. Every guard words its refusal here."""

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

WITHOUT = "serve without --kv-eviction"
"""The way out that there always is."""


class Unsupported(NamedTuple):
    """One row of a table of refusals.

    feature: with its value, as it follows "does not support".
    present: true if it is asked for.
    way_out: what to do instead; WITHOUT is added to it.
    """

    feature: str
    present: object
    way_out: str = ""


def refuse(what: str, *ways_out: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises `error`: "what; this, or that". Without any way out it is WITHOUT."""
    *others, last = ways_out or (WITHOUT,)
    raise error(f"{what}; {', '.join(others)}{', or ' if others else ''}{last}")


def refuse_first(rows: Iterable[Unsupported], who: str = "--kv-eviction", what: str = "") -> None:
    """Raises ValueError for the first row that is present.

    who: the option that does not support it; what: of what the features are, "models with " say."""
    for row in rows:
        if row.present:
            refuse(f"{who} does not support {what}{row.feature}", *filter(None, (row.way_out, WITHOUT)))
