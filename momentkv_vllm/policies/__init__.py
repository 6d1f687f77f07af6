"""Eviction policies, by the name that `--kv-eviction` takes. One file each; base.py says what a policy is."""

from momentkv_vllm.policies.base import Candidates, Policy
from momentkv_vllm.policies.expected_attention import ExpectedAttention
from momentkv_vllm.policies.h2o import H2O
from momentkv_vllm.policies.keydiff import KeyDiff
from momentkv_vllm.policies.knorm import KNorm
from momentkv_vllm.policies.momentkv import MomentKV
from momentkv_vllm.policies.paper import Paper
from momentkv_vllm.policies.random import Random
from momentkv_vllm.policies.snapkv import SnapKV
from momentkv_vllm.policies.streamingllm import StreamingLLM
from momentkv_vllm.policies.tova import TOVA

POLICIES: dict[str, type[Policy]] = {
    p.name: p for p in (MomentKV, Paper, StreamingLLM, Random, KNorm, KeyDiff, H2O, TOVA, SnapKV, ExpectedAttention)
}

__all__ = ["POLICIES", "Candidates", "Policy"]
