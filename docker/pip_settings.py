"""pip's settings on this machine as `buildah bud` volumes: one generated pip.conf, and the files and folders that it names.

python3 docker/pip_settings.py FOLDER      prints one volume option a line
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

INSIDE = "/root/.config/pip"


def settings() -> dict[str, str]:
    """Merged settings of pip's files and environment: option without its section, value."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    # Environment variables come as ":env:.option" and win.
    found = sorted((key.startswith(":env:"), key.rsplit(".", 1)[1], ast.literal_eval(value)) for key, value in pairs)
    return {option: value for _, option, value in found}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    volumes = {f"{folder}:{INSIDE}": None}
    lines = ["[global]"]
    for option, value in settings().items():
        parts = []
        for part in value.split():
            path = Path(part.removeprefix("file://"))
            if path.is_absolute() and path.is_file():
                shutil.copy(path, folder / path.name)
                part = f"{INSIDE}/{path.name}"
            elif path.is_absolute() and path.is_dir():
                # Index pages link to files beside them.
                top = path.parent if part.startswith("file://") else path
                volumes[f"{top}:{top}"] = None
            parts.append(part)
        lines.append(f"{option} = " + "\n    ".join(parts))
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    for volume in volumes:
        print(f"--volume={volume}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
