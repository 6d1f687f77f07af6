"""Where this package is joined to vLLM: registration, options, refusals, and the ledger of what it patches.

Classes that vLLM lets us register or name (backend, KV cache spec, block manager, scheduler) are no patches, nor are options
that a user could have given (engine_args.py sets some that were left open). These are:

| patched | where | symptom without it | removed when |
|---|---|---|---|
| EngineArgs.add_cli_args | engine_args.py | `vllm serve --kv-eviction` is an unknown option | vLLM lets plugins add options |
| EngineArgs.from_cli_args | engine_args.py | the parsed options reach no config | same |
| EngineArgs.create_engine_config | engine_args.py | nothing is refused before the engine starts | vLLM has a config hook |
| CPUModelRunner.sample_tokens | cpu_runner.py | a seed and a long prompt end a CPU engine | vLLM rewinds CPU generators |
| Worker.initialize_from_config | worker.py | all heads hold as many tokens; GPUs compile late | vLLM has a hook behind it |
| CPUModelRunner._build_attention_metadata | row_classes.py | rows all get the default budget | builders see requests |
| InputProcessor.process_inputs | requests.py | an unknown budget class ends the engine | plugins may check requests |
| OpenAIServingChat.chat_completion_stream_generator | usage.py | usage says nothing of eviction | usage may be extended |
| OpenAIServingChat.chat_completion_full_generator | usage.py | same | same |
| OpenAIServingCompletion.completion_stream_generator | usage.py | same | same |
| OpenAIServingCompletion.request_output_to_completion_response | usage.py | same | same |
| CPUModelRunner._input_fits_in_drafter | drafts.py | drafters' layers miss steps, and evictions | drafters follow every step |
| CPUModelRunner.propose_draft_token_ids | drafts.py | drafts pass --max-model-len; a draft model's pages are others' | same |
| CPUModelRunner._zero_block_ids | block_memory.py | hybrids: other sequences' tokens are erased | vLLM zeroes whole blocks |
| gpu_model_runner.copy_kv_cache_blocks_inplace | block_memory.py | hybrids: pages are copied in part | copies are whole |
| Worker.determine_available_memory | gpu.py | what is observed lies beside the granted memory | specs ask for it |
| EngineCore.kv_eviction_states | engine_core.py | no states in files | vLLM lets a scheduler call workers |
| model_arch_config.rswa_window | attention/prompt_lengths.py | builders learn no prompt lengths | their metadata has them |

The first three are in place before vLLM builds its parser. The fourth mends stock vLLM as well. The fifth runs the model once,
when its KV cache is there. What concerns budgets of requests changes nothing for one that names none. Those of block_memory.py
mend what stock runs into with blocks of several pages, and with copies in hybrid models. The one of `Worker` is CUDA's only.
The one of `EngineCore` is added and replaces nothing. The last is a value, no method: set in the worker's copy of the model
config where a page schedule asks for prompt lengths.

tests/seams/test_seams.py is the second ledger: it finds every patch in our source, wants it in this table, and says by name which
target vLLM renamed.
"""
