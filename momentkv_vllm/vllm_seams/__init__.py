"""Where this package is joined to vLLM: registration, options, refusals, and the ledger of what it patches.

Classes that vLLM lets us register or name (backend, KV cache spec, block manager, scheduler) are no patches. These are:

| patched | symptom without it | removed when |
|---|---|---|
| EngineArgs.add_cli_args (1) | `vllm serve --kv-eviction` is an unknown option | vLLM lets plugins add options |
| EngineArgs.from_cli_args (1) | the parsed options reach no config | same |
| EngineArgs.create_engine_config (1) | nothing is refused before the engine starts | vLLM has a config hook |
| CPUModelRunner.sample_tokens (2) | a seed and a prompt of several steps end a CPU engine | vLLM rewinds CPU generators |
| rswa_window, a value that is set (3) | builders learn no prompt lengths | their metadata has them |

(1) engine_args.py; in place before vLLM builds its parser. (2) cpu_runner.py; stock vLLM ends, too. (3) attention/backend.py, in
the worker's model config, for `full` prefill. A renamed target fails loudly when it is patched (AttributeError), and by name
in tests/test_seams.py.
"""
