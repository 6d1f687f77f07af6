"""What run D needs of vLLM, in parts that can be carried: `pack.py WHEEL... --into build/site`.

WHEEL: those of engine_wheels.txt, for the machine's Python: `pip download --no-deps --only-binary=:all: --python-version 3.12
--platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
-d build/wheels -r benchmarks/gpu/engine_wheels.txt`, without version and platforms if that pip is a Python 3.12's. Writes
part0.zip and so on, none above LIMIT, each of whole files. There, in one call for every part while the machine stays warm,
`python3 -m zipfile -e build/site/part0.zip /tmp/site`; then PYTHONPATH=/tmp/site python3 benchmarks/gpu/run.py D. Of vLLM's
libraries only those that an H100 asks for.
"""

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIMIT = 54 << 20
"""Bytes of a part: 64 MiB travel in a call, this repository's 8 among them. The largest library takes 53.6, packed anyhow."""
LIBRARIES = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
LEFT_OUT = ("vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/", "vllm/third_party/tml_fa4/", "vllm/vllm-rs")


def wanted(name: str) -> bool:
    """Whether run D needs a file of a wheel."""
    if name.startswith(LEFT_OUT) or name.endswith("/"):
        return False
    if name.startswith("vllm/"):
        return name in LIBRARIES or name.endswith((".py", ".json"))
    return True


def files(wheels: list[Path]) -> Iterator[tuple[Path, zipfile.ZipInfo]]:
    """(wheel, file), the largest first, so that they share parts with small ones."""
    found = [(w, info) for w in wheels for info in zipfile.ZipFile(w).infolist() if wanted(info.filename)]
    yield from sorted(found, key=lambda pair: -pair[1].compress_size)


def parts(wheels: list[Path], limit: int) -> list[list[tuple[Path, zipfile.ZipInfo]]]:
    """Files by part, each into the first that has room. Raises ValueError for a file that no part can hold."""
    made: list[list] = []
    room: list[int] = []
    for wheel, info in files(wheels):
        # Twice its name and the headers of a zip archive stand beside it.
        size = info.compress_size + 2 * len(info.filename) + 200
        if size > limit:
            raise ValueError(f"{info.filename} of {wheel.name} has {size} bytes, a part {limit}: leave it out")
        number = next((i for i, left in enumerate(room) if left >= size), len(made))
        if number == len(made):
            made.append([])
            room.append(limit)
        made[number].append((wheel, info))
        room[number] -= size
    return made


def write(wheels: list[Path], into: Path, limit: int = LIMIT) -> list[Path]:
    """The parts' paths."""
    into.mkdir(parents=True, exist_ok=True)
    opened, paths = {wheel: zipfile.ZipFile(wheel) for wheel in wheels}, []
    for number, part in enumerate(parts(wheels, limit)):
        paths.append(into / f"part{number}.zip")
        with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED) as archive:
            for wheel, info in part:
                archive.writestr(info.filename, opened[wheel].read(info))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=Path("build/site"))
    args = parser.parse_args()
    for path in write(args.wheels, args.into):
        print(f"{path} {path.stat().st_size / 2**20:.1f} MiB, {len(zipfile.ZipFile(path).namelist())} files")


if __name__ == "__main__":
    main()
