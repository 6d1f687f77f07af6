"""The locked environment imports what models that see need: PyPI's torchvision, built for CUDA, beside a CPU build of torch."""

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import functional

MOMENTKV = str(Path(sys.executable).parent / "momentkv")

MISSING = {
    "vllm.model_executor.models.cohere_asr": "torchaudio",
    "vllm.model_executor.models.funasr": "torchaudio",
    "vllm.model_executor.models.midashenglm": "torchaudio",
    # vLLM's own wheels do not require these two.
    "vllm.model_executor.models.kanana_v": "timm",
    "vllm.model_executor.models.terratorch": "terratorch",
    # Imports from vLLM what only its build for CUDA has.
    "vllm.models.dots3_note": "flash_attn",
}
"""Modules of vLLM's table of models that cannot be imported, and what is missing."""

IMPORT_ALL = """
import importlib, json
from vllm.model_executor.models.registry import ModelRegistry
modules = {m.module_name for m in ModelRegistry.models.values()}
errors = {}
for name in sorted(modules):
    try:
        importlib.import_module(name)
    except Exception as error:
        errors[name] = str(error)
print(json.dumps([len(modules), errors]))
"""


def python(code: str, **env: str) -> str:
    """Output of `code` in a process of its own, in which vLLM loads no plugin."""
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_PLUGINS": ""} | env
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_model_of_vllm_can_be_imported_but_the_named_ones():
    count, errors = json.loads(python(IMPORT_ALL).splitlines()[-1])
    assert count > 250
    assert errors.keys() == MISSING.keys(), errors
    assert all(what in errors[module] for module, what in MISSING.items()), errors


def test_transforms_compute():
    """Against torch's own resize; a fast image processor is nothing but these."""
    image = torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0)).float()
    size, mode = [20, 35], functional.InterpolationMode.BICUBIC
    want = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    torch.testing.assert_close(functional.resize(image, size, mode, antialias=True), want)
    normal = functional.normalize(image / 255, [0.5] * 3, [0.25] * 3)
    torch.testing.assert_close(normal, (image / 255 - 0.5) / 0.25)


@pytest.mark.skipif("+cpu" in metadata.version("torchvision"), reason="a build for CPUs has the operators")
def test_operators_that_are_missing_say_so():
    from torchvision import io, ops

    with pytest.raises(RuntimeError, match="Couldn't load custom C"):
        ops.nms(torch.zeros(2, 4), torch.zeros(2), 0.5)
    with pytest.raises(RuntimeError, match="Couldn't load the image extension"):
        io.decode_image(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("library", ["loads", "fails", "missing"])
def test_a_torchvision_whose_library_loads_is_left_alone(tmp_path, library):
    """Its own library declares the operators, and a second declaration would be an error."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    if library == "loads":
        shutil.copy(_ctypes.__file__, package / "_C.so")
    if library == "fails":
        (package / "_C.so").write_text("no library")
    code = "import torch; print(hasattr(torch.ops.torchvision, 'nms'), hasattr(torch.ops.torchvision, 'qnms'))"
    found = python(code, PYTHONPATH=str(tmp_path)).split()
    assert found == ["False" if library == "loads" else "True"] * 2


@pytest.mark.skipif("+cpu" in metadata.version("torchvision"), reason="a build for CPUs always works")
def test_doctor_says_that_it_does_not_work(tmp_path):
    """That it does: tests/unit/test_doctor.py."""
    # torch then calls no entry point.
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([MOMENTKV, "doctor"], capture_output=True, text=True, cwd=tmp_path, env=env)
    line = next(line for line in done.stdout.splitlines() if line.split()[0] == "torchvision")
    assert "cannot be imported" in line
