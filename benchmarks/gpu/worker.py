"""One worker of a run: `worker.py JOB`, a file with its tasks (kit.py)."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # shape.py


def main() -> None:
    path = Path(sys.argv[1])
    import kit
    import runs

    device = "cpu" if json.loads(path.read_text())["interpreted"] else "cuda"
    kit.work(path, lambda task: runs.do(task, device))


if __name__ == "__main__":
    main()
