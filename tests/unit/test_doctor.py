"""`momentkv doctor` as a user runs it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

MOMENTKV = str(Path(sys.executable).parent / "momentkv")


def doctor(tmp_path, **env):
    settings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")} | env
    return subprocess.run([MOMENTKV, "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path, env=settings)


def test_everything_works_here(tmp_path):
    done = doctor(tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["problems"] == []
    families = report["kernel_families"]
    assert families["cpu"] == families["reference"] == []
    assert "cuda" in families
    assert families["triton"] == [] or "no CUDA GPU" in families["triton"][0]
    assert report["kernels"] in ("cpu (amx)", "cpu (avx512vnni)", "cpu (avx512)", "cpu (avx2)", "cpu (generic)")
    assert report["packages"]["vllm"].split("+")[0] in report["tested_vllm"]
    assert report["tested_vllm"]["0.32.0"] == "its CPU build"
    assert report["torchvision"] == f"{metadata.version('torchvision')} works"


def test_what_the_environment_prevents_is_said(tmp_path):
    """A plugin that vLLM would not load, an unknown instruction set."""
    done = doctor(tmp_path, VLLM_PLUGINS="other", MOMENTKV_CPU_ISA="sse9")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and "VLLM_PLUGINS='other'" in report["problems"][0]
    assert "MOMENTKV_CPU_ISA=sse9" in report["kernel_families"]["cpu"][0]
    assert report["kernels"] == "reference"


def test_triton_kernels_live_inside_the_package(tmp_path):
    code = "import momentkv_vllm.triton_kernels, importlib.util as u; assert u.find_spec('triton_kernels') is None"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
