"""Which kernel family runs, on which instruction set, and what its operators refuse."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import serving_batch

from momentkv_vllm.config import KERNELS
from momentkv_vllm.kernels import FAMILIES, select

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "isa",
    [
        "avx512vnni",
        pytest.param("avx512", marks=pytest.mark.slow),
        "avx2",
        pytest.param("generic", marks=pytest.mark.slow),
    ],
)
def test_the_other_instruction_sets(isa):
    """The same cases in a process that may not use the best one."""
    if isa == select("cpu").isa():
        pytest.skip("the other tests use it")
    environment = os.environ | {"MOMENTKV_CPU_ISA": isa}
    asks = [sys.executable, "-P", "-c", "from momentkv_vllm.kernels import select; select('cpu').isa()"]
    if b"this machine or build does not have it" in subprocess.run(asks, capture_output=True, env=environment).stderr:
        pytest.skip(f"this machine has no {isa}")
    # -P: the installed package, not the folder that the tests run in.
    pytest_ = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # avx512 differs from avx512vnni in integer dot products alone, avx512vnni from amx in attention.
    of = {"avx512": "test_[ps]*_kernels.py", "avx512vnni": "test_[ap]*_kernels.py"}
    files = HERE.glob(of.get(isa, "test_*_kernels.py"))
    command = [*pytest_, *files, "-k", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_operators_check_what_they_are_given():
    """A wrong tensor is an error that names it, never memory of someone else."""
    cpu = select("cpu")
    cache, work, query = serving_batch(torch.bfloat16, 64, "bfloat16", "first", 4)
    output = torch.empty_like(query)
    with pytest.raises(RuntimeError, match="output"):
        cpu.attend(cache, query, output[:, :4], None, work, 0.1, True)
    with pytest.raises(RuntimeError, match="query"):
        cpu.attend(cache, query.float(), output.float(), None, work, 0.1, True)
    narrow = replace(work, moment_pages=work.moment_pages[:, :1].contiguous())
    with pytest.raises(RuntimeError, match="moment_pages has 1 pages of .* bytes a head; its record needs"):
        cpu.attend(cache, query, output, None, narrow, 0.1, True)
    with pytest.raises(RuntimeError, match="weights has room for 4 query rows, row 5 has 16 that count"):
        cpu.attend(cache, query, output, None, replace(work, most_queries=1), 0.1, True)
    work.last_slot[3] = 10_000
    with pytest.raises(RuntimeError, match="row 3 sees more slots"):
        cpu.attend(cache, query, output, None, work, 0.1, True)


def test_a_named_family_never_falls_back(monkeypatch):
    monkeypatch.setattr(select("cpu"), "objections", lambda: ["no compiler"])
    assert select("auto") is select("reference")
    with pytest.raises(ValueError, match="'cpu' cannot run here: no compiler"):
        select("cpu")


@pytest.mark.parametrize(("name", "device"), [("cpu", "cuda"), ("triton", "cpu")])
def test_a_named_family_must_run_on_the_device(name, device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"does not run on '{device}' tensors"):
        select(name, device)


def test_the_setting_names_the_families():
    """Stated in config.py too, which must not import kernels."""
    assert sorted(KERNELS) == sorted(["auto", *(family.name for family in FAMILIES)])
