"""The guide's policy: docs/policies.md and its package."""

import re

from named_files import ROOT

PACKAGE = ROOT / "examples/momentkv-policy-vatp"
GUIDE = (ROOT / "docs/policies.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)


def run_the_guide() -> dict:
    """Every Python block of the guide, one after the other; the last one calls check_policy."""
    names: dict = {"__name__": "guide"}
    for block in blocks("python"):
        exec(compile(block, "docs/policies.md", "exec"), names)
    return names
