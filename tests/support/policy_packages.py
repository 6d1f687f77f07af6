"""Packages with an eviction policy, as pip leaves them in a folder of installed packages."""

from pathlib import Path

MODULE = """
import torch

from momentkv_vllm.policies import Policy


class Theirs(Policy):
    name, source, summary = "theirs", "a paper", "a newer token scores higher"
    reads = ("order",)
    defaults = {"window_tokens": 48}

    def score(self, tokens):
        return torch.arange(tokens.keys.shape[2]).float().expand(tokens.keys.shape[:3]).clone()
"""


def install(folder: Path, package: str, *, module: str, name: str, version: str = "0.1", source: str = MODULE) -> None:
    """`package` with the file `module`.py = `source`, whose class Theirs is entered as the policy `name`."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[momentkv_vllm.policies]\n{name} = {module}:Theirs\n")
