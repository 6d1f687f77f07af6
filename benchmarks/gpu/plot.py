"""Two panels: the price of the correction by budget, and the speed-up over full contexts."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen


def save(results: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for name, parts in results["families"].items():
        for rows in sorted({d["rows"] for d in parts["decode"]}):
            points = [d for d in parts["decode"] if d["rows"] == rows and d["shape"].endswith("bfloat16")]
            points = [d for d in points if d["head_dim"] == max(p["head_dim"] for p in points)]
            left.plot(
                [p["slots"] for p in points],
                [p["correction_to_plain"] for p in points],
                "o-",
                label=f"{name}, batch {rows}",
            )
            wide = [c for c in parts["context"] if c["rows"] == rows]
            right.plot(
                [c["context"] for c in wide],
                [c["speedup_over_best"] for c in wide],
                "o-",
                label=f"{name}, batch {rows}",
            )
            right.plot([c["context"] for c in wide], [c["bytes_bound"] for c in wide], "k--", lw=0.8)
    left.set(xscale="log", xlabel="retained tokens", ylabel="decode with correction / without")
    right.set(
        xscale="log", yscale="log", xlabel="context", ylabel="speed-up over the best full attention (dashed: bytes)"
    )
    left.legend(fontsize=8)
    if results["interpreted"]:
        figure.suptitle("Triton's interpreter: says nothing about a GPU")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
