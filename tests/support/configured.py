"""vLLM configurations with eviction, and checkpoints with other settings."""

import json
import shutil

from vllm import EngineArgs

EVICT = {"kv_eviction": {"policy": "momentkv", "budget_tokens": 256}}


def config_of(model, **options):
    given = {"max_model_len": 2048, "additional_config": EVICT} | options
    return EngineArgs(model=str(model), **given).create_engine_config()


def changed_model(folder, source, **changes):
    """The tiny Llama's folder with other values in config.json (weights are not read here)."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
