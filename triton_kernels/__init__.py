"""Triton device code; knows nothing of vLLM. Installed as `momentkv_vllm.triton_kernels` (setup.py says why)."""
