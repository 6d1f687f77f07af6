"""Declares the two operators without which torchvision 0.28 cannot be imported when its own library does not load.

torchvision/extension.py goes on without its library, as transforms need none of it; but torchvision/_meta_registrations.py
names `nms` and `qnms` unconditionally. Nothing is computed here: `torchvision.ops.nms`, `roi_align` and their like, and
`torchvision.io.decode_image`, still raise torchvision's "Couldn't load custom C++ ops".
"""

import importlib.util
from pathlib import Path

import torch

NAMES = ("nms", "qnms")

library = torch.library.Library("torchvision", "FRAGMENT")


def declare_operators() -> None:
    """Does nothing without torchvision, and beside a build of it that loads here (one for the CPU, say)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _loads(Path(spec.origin).parent):
        return
    for name in NAMES:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _loads(folder: Path) -> bool:
    """Whether torchvision's own operators can be loaded; they are then, as they would be by `import torchvision`."""
    try:
        for path in folder.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return any(folder.glob("_C*.so"))
