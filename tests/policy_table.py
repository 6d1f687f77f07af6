"""The README's list of policies, from their classes. `make policies-table` writes it."""

from pathlib import Path

from momentkv_vllm.policies import OFF, builtins

README = Path(__file__).parent.parent / "README.md"
HEADING = "| policy | a token's score (higher stays) | source | its own defaults |"


def table() -> str:
    rows = [HEADING, "|---|---|---|---|"]
    for name, policy in builtins().items():
        defaults = ", ".join(f"`{key}` {value}" for key, value in policy.defaults.items())
        rows.append(f"| `{name}` | {policy.summary} | {policy.source} | {defaults} |")
    return "\n".join(rows)


def flag() -> str:
    return f"`--kv-eviction {{{','.join([OFF, *builtins()])}}}`"


def updated(text: str) -> str:
    """`text` with table and flag as they should be."""
    before, rest = text.split(HEADING)
    text = before + table() + "\n\n" + rest.split("\n\n", 1)[1]
    before, rest = text.split("`--kv-eviction {")
    return before + flag() + rest.split("`", 1)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
