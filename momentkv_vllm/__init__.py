"""momentkv_vllm: a fixed KV budget per sequence for vLLM, with the evicted attention mass added back.

Nothing is imported here on purpose: vLLM loads `momentkv_vllm.plugin` in every process, and an import error there
would be swallowed by vLLM and leave a server running without eviction.
"""

__version__ = "0.1.0"
