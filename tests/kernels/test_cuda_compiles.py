"""What nvcc makes of the CUDA kernels for sm_80 and sm_90a: no spills, and the registers that csrc/cuda/README.md states."""

import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulated
import pytest
import torch
from torch.utils import cpp_extension

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a")
README = cuda_emulated.SOURCES / "README.md"
KERNEL = re.compile(
    r"\d(attend_units|merge_units|observe_page|select_losers|fold_losers|retire|write_tokens|zero_fresh_pages)"
)
NUMBERS = re.compile(r"I(?:NS0?_\d+)?(BFloat16|Float16)ELi(\d+)E")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is missing: the CUDA sources are not compiled here"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(kernel, number type or "", head_dim or 0): {architecture: (registers, spilled bytes)}} as ptxas reports it."""
    folder = tmp_path_factory.mktemp("nvcc")

    def compile_one(source: Path) -> str:
        targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
        command = [NVCC, "-std=c++17", "-Werror", "all-warnings", *targets, "-Xptxas", "-v", "-fatbin", str(source)]
        done = subprocess.run([*command, "-o", str(folder / f"{source.stem}.fatbin")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    found: dict = {}
    with ThreadPoolExecutor(2) as pool:
        for text in pool.map(compile_one, sorted(cuda_emulated.SOURCES.glob("*.cu"))):
            for name, architecture, report in re.findall(
                r"entry function '(\w+)' for '(\w+)'(.*?registers)", text, re.S
            ):
                numbers = NUMBERS.search(name)
                key = (KERNEL.search(name)[1], *((numbers[1], int(numbers[2])) if numbers else ("", 0)))
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
                found.setdefault(key, {})[architecture] = (int(re.search(r"Used (\d+) registers", report)[1]), spilled)
    return found


def test_every_kernel_compiles_without_spills(compiled):
    six = {(t, d) for t in ("BFloat16", "Float16") for d in (64, 128, 256)}
    want = {(kernel, *n) for kernel in ("attend_units", "merge_units", "observe_page") for n in six}
    want |= {(kernel, *n) for kernel in ("fold_losers", "retire") for n in six}
    want |= {(kernel, "", 0) for kernel in ("select_losers", "write_tokens", "zero_fresh_pages")}
    assert set(compiled) == want
    for kernel, reports in compiled.items():
        assert set(reports) == set(ARCHITECTURES)
        assert all(spilled == 0 for _, spilled in reports.values()), (kernel, reports)


def table(compiled) -> str:
    """Registers of the bfloat16 kernels by architecture."""
    lines = ["| kernel | head_dim | sm_80 | sm_90a |", "|---|---|---|---|"]
    for (kernel, number, d), reports in sorted(compiled.items()):
        if number != "Float16":
            lines.append(f"| {kernel} | {d or ''} | {' | '.join(str(reports[a][0]) for a in ARCHITECTURES)} |")
    return "\n".join(lines)


def test_the_register_table_is_what_nvcc_says(compiled):
    stated = re.search(r"<!-- nvcc (\S+) -->\n(\|.*?)\n\n", README.read_text(), re.S)
    version = re.search(r"release (\S+),", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[
        1
    ]
    if version != stated[1]:
        pytest.skip(f"the table is of nvcc {stated[1]}, this is {version}")
    assert stated[2] == table(compiled)


def test_the_bindings_agree_with_the_headers_of_cuda(tmp_path):
    """Syntax and types only: linking needs a CUDA build of torch."""
    homes = [Path(NVCC).resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    cuda = next((home for home in homes if (home / "cuda_runtime_api.h").exists()), None)
    if cuda is None:
        pytest.skip(f"no CUDA headers in {homes}")
    if torch.version.cuda is None:  # the CPU build of torch has all headers but this one
        stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        stub.parent.mkdir(parents=True)
        stub.touch()
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(cuda), str(tmp_path)]
    command = ["g++", "-std=c++20", "-fsyntax-only", *(f"-isystem{path}" for path in includes)]
    done = subprocess.run([*command, str(cuda_emulated.SOURCES / "bindings.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
