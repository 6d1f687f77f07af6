"""The server of test_prometheus.py and test_server.py: it evicts, and has two API servers, a key and the endpoint."""

from pathlib import Path

import pytest
from server import Server

from momentkv_vllm.environment import METRICS_DIR

KEY = "sk-not-to-be-shown"
# A prompt may need several times the pool.
OPTIONS = ["--kv-eviction", "momentkv", "--kv-budget", "256", "--kv-eviction-config.window_tokens", "48"]
OPTIONS += ["--num-gpu-blocks-override", "81", "--max-num-batched-tokens", "256", "--max-model-len", "6000"]
OPTIONS += ["--api-server-count", "2", "--api-key", KEY]


def start(model: Path, folder: Path) -> Server:
    with pytest.MonkeyPatch.context() as environment:
        # A server started from another vLLM process inherits that one's metrics directory, and must not use it.
        environment.setenv(METRICS_DIR.name, str(folder))
        return Server(model, *OPTIONS, folder=folder, environment={"VLLM_PLUGINS": "momentkv,momentkv_endpoint"})
