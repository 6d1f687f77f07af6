"""Where this package is joined to vLLM: registration, options, refusals, and the ledger of what it patches.

Classes that vLLM lets us register or name (backend, KV cache spec, block manager, scheduler) are no patches. These are:

| patched | file | symptom without it | removed when |
|---|---|---|---|
| EngineArgs.add_cli_args | engine_args.py | `vllm serve --kv-eviction` is an unknown option | vLLM lets plugins add options |
| EngineArgs.from_cli_args | engine_args.py | the parsed options reach no config | same |
| EngineArgs.create_engine_config | engine_args.py | no place to refuse or default options before the engine starts | vLLM has a config hook |
| CPUModelRunner.sample_tokens | cpu_runner.py | a seeded prompt that takes several steps ends a CPU engine, stock too | vLLM rewinds CPU generators |
| rswa_window of the worker's model config (a value, set) | ../attention/backend.py | builders learn no prompt lengths (`full` prefill) | CommonAttentionMetadata has them |

The first three are in place before vLLM builds its parser. A renamed target fails loudly when it is patched (AttributeError), and
by name in tests/test_seams.py.
"""
