"""One worker of a run: `worker.py JOB`, JSON of its tasks, of the file for results, and whether Triton interprets."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # shape.py


def main() -> None:
    job = json.loads(sys.argv[1])
    import kit
    import runs

    kit.work(job, lambda task: runs.do(task, "cpu" if job["interpreted"] else "cuda"))


if __name__ == "__main__":
    main()
