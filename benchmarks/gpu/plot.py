"""Two panels: the price of the correction by budget, and the speed-up over full contexts."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen


def save(results: dict[str, Any], path: Path) -> None:
    """results: of run B."""
    rows = {kind: [x["result"] for x in results["done"] if x["task"]["what"] == kind] for kind in ("decode", "context")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for family, batch in sorted({(d["family"], d["rows"]) for d in rows["decode"]}):
        points = sorted(
            (d["slots"], d["correction_to_plain"])
            for d in rows["decode"]
            if (d["family"], d["rows"], d["record"]) == (family, batch, "zeroth")
        )
        left.plot(*zip(*points, strict=True), "o-", label=f"{family}, batch {batch}")
    for family, batch in sorted({(c["family"], c["rows"]) for c in rows["context"]}):
        wide = sorted(
            (c for c in rows["context"] if (c["family"], c["rows"]) == (family, batch)), key=lambda c: c["context"]
        )
        contexts = [c["context"] for c in wide]
        right.plot(contexts, [c["speedup_over_best"] for c in wide], "o-", label=f"{family}, batch {batch}")
        right.plot(contexts, [c["bytes_bound"] for c in wide], "k--", lw=0.8)
    left.set(xscale="log", xlabel="retained tokens", ylabel="decode with correction / without")
    right.set(
        xscale="log", yscale="log", xlabel="context", ylabel="speed-up over the best full attention (dashed: bytes)"
    )
    for axis in (left, right):
        if axis.lines:
            axis.legend(fontsize=8)
    if results["interpreted"]:
        figure.suptitle("Triton's interpreter: says nothing about a GPU")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
