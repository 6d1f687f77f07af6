"""Eviction policies, by the name that `--kv-eviction` takes. One file each; base.py says what a policy is."""

from momentkv_vllm.policies.base import Candidates, Policy
from momentkv_vllm.policies.momentkv import MomentKV
from momentkv_vllm.policies.paper import Paper
from momentkv_vllm.policies.streamingllm import StreamingLLM

POLICIES: dict[str, type[Policy]] = {p.name: p for p in (MomentKV, Paper, StreamingLLM)}

__all__ = ["POLICIES", "Candidates", "Policy"]
