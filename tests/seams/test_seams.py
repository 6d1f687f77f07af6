"""Every place where we hold on to vLLM: a renamed method, parameter or field fails here by name, before it fails anywhere else."""

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "momentkv_vllm"
TABLE = tomllib.loads((Path(__file__).parents[1] / "support/relied_on.toml").read_text())


def relied_on(kind: str) -> list:
    """(vLLM's object, parameters or fields that we rely on, who relies on it), one a test."""
    rows = [(path, names, user) for user, table in TABLE[kind].items() for path, names in table.items()]
    return [pytest.param(*row, id=row[0].split(":")[1]) for row in rows]


def find(path: str):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        assert hasattr(found, name), f"vLLM has no {path} any more"
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("path", "parameters", "user"), relied_on("calls"))
def test_calls(path, parameters, user):
    found = find(path)
    known = inspect.signature(inspect.unwrap(found)).parameters
    for name in parameters:
        assert name in known or name == "self", f"{path} lost its parameter {name!r}, which {user} relies on"


@pytest.mark.parametrize(("path", "names", "user"), relied_on("fields"))
def test_fields(path, names, user):
    known = {f.name for f in dataclasses.fields(find(path))}
    for name in names:
        assert name in known, f"{path} lost its field {name!r}, which {user} relies on"


@pytest.mark.parametrize(("path", "parameters", "user"), relied_on("calls"))
def test_who_relies_on_a_call_names_it(path, parameters, user):
    """A file of ours that moved, or that let go of vLLM's method, is still listed here."""
    assert path.split(":")[1].split(".")[-1] in (PACKAGE / user).read_text(), f"{user} does not name {path}"


@pytest.mark.parametrize(("path", "names", "user"), relied_on("fields"))
def test_who_relies_on_fields_exists(path, names, user):
    assert (PACKAGE / user).exists(), f"{user} is listed for {path}"


def source(path: str) -> str:
    return inspect.getsource(find(path))


def test_we_are_loaded_as_a_general_plugin():
    group = find("vllm.plugins:DEFAULT_PLUGINS_GROUP")
    ours = [e.value for e in entry_points(group=group) if e.name == "momentkv"]
    assert ours == ["momentkv_vllm.plugin:register"]


def test_the_cpu_platform_asks_for_the_backend_that_we_replace():
    assert "CPU_ATTN" in source("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls")


def test_runners_ask_every_layer_for_its_spec():
    assert "customize_attention_spec(" in source("vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_kv_cache_spec")
    assert "backend.customize_spec(spec)" in source("vllm.v1.worker.utils:customize_attention_spec")


def test_layers_give_their_window_to_ours_and_ask_what_one_token_takes():
    """attention/layer.py takes windows that hide nothing away, attention/spec_hook.py leaves pages of one token as they are."""
    attention = "vllm.model_executor.layers.attention:Attention"
    call = source(f"{attention}.__init__").split("self.impl = impl_cls(")[1]
    given = [line.split("#")[0].strip(" ,") for line in call.splitlines()[1:]]
    assert given[:6] == ["num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"]
    assert "block_size=1," in source(f"{attention}.get_kv_cache_spec")


def test_pages_get_what_the_worker_says_is_available():
    """vllm_seams/gpu.py takes off what lies beside them, and asks the runner for the layers' specs."""
    text = source("vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec")
    assert "self.model_runner.get_kv_cache_spec()" in text
    sizes = source("vllm.v1.engine.core:EngineCore._initialize_kv_caches")
    assert "self.model_executor.determine_available_memory()" in sizes


def test_the_scheduler_lets_us_shorten_running_and_waiting_requests_last():
    """Between our word on the number of tokens and the allocation nothing may change it."""
    text = source("vllm.v1.core.sched.scheduler:Scheduler.schedule")
    parts = text.split("self._reserve_prefill_lookahead(")
    assert len(parts) == 3, (
        "schedule() does not ask _reserve_prefill_lookahead once for running and once for waiting requests"
    )
    for part in parts[1:]:
        until_allocation = part.split("allocate_slots(")[0]
        assert "num_new_tokens = " not in until_allocation, "schedule() changes num_new_tokens after our word"


def test_pages_are_freed_on_settled_tokens_before_new_ones_are_allocated():
    text = source("vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots")
    assert "total_computed_tokens - request.num_in_flight_tokens" in text
    steps = [
        "remove_skipped_blocks(",
        "allocate_new_computed_blocks(",
        "coordinator.allocate_new_blocks(",
        ".cache_blocks(",
    ]
    places = [text.index(s) for s in steps]
    assert places == sorted(places), f"allocate_slots does not call {steps} in this order"


def test_what_a_scheduler_says_of_a_request_reaches_its_output():
    """Where what a request held travels (vllm_seams/usage.py), and nothing else of it before the request gives back its pages."""
    text = source("vllm.v1.core.sched.scheduler:Scheduler.update_from_output")
    assert "kv_transfer_params, ec_transfer_params = self._free_request(request)" in text
    assert "kv_transfer_params=kv_transfer_params" in text
    text = source("vllm.v1.core.sched.scheduler:Scheduler._free_request")
    assert text.index("self._free_blocks(request)") < text.index("return kv_xfer_params, ec_xfer_params")


def test_api_servers_have_imported_what_we_know_them_by():
    """vllm_seams/engine_args.py patches their handlers, and no other process's."""
    from momentkv_vllm.vllm_seams.engine_args import API_SERVER

    assert f"from {API_SERVER} import" in inspect.getsource(importlib.import_module("vllm.entrypoints.cli.serve"))
    handler = source("vllm.entrypoints.generate.base.serving:GenerateBaseServing.__init__")
    assert "self.input_processor = engine_client.input_processor" in handler


def test_workers_get_a_request_s_extra_arguments():
    """vllm_seams/row_classes.py reads them by row, of the requests that the runner keeps while they wait again, too."""
    assert "sampling_params" in {f.name for f in dataclasses.fields(find("vllm.v1.core.sched.output:NewRequestData"))}
    runner = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
    assert "sampling_params=sampling_params" in source(f"{runner}._update_states")
    assert "self.requests[req_id]" in source(f"{runner}._build_attention_metadata")


def test_the_runner_still_rewinds_the_generators_of_unfinished_prompts():
    """What vllm_seams/cpu_runner.py works around; without it that patch can go."""
    text = source("vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync")
    assert "self.discard_request_mask.np[:num_reqs]" in text and "gen.set_offset(gen.get_offset() - 4)" in text


def test_what_a_block_is_in_a_view_is_still_mistaken():
    """What vllm_seams/block_memory.py works around; without it those patches can go."""
    assert "kv[block_id].zero_()" in source("vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids")
    copies = source("vllm.v1.worker.utils:copy_kv_cache_blocks_inplace")
    assert "key = (cache.device, cache.data_ptr())" in copies and "nbytes" not in copies.split("if key in seen")[0]
    assert "copy_kv_cache_blocks_inplace(\n                self.kv_caches," in source(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states"
    )


def test_blocks_are_aligned_once_the_layers_are_known_and_again_to_the_same_size():
    """What vllm_seams/hybrids.py asks for earlier: it goes up to a multiple of the block size that it finds."""
    assert "_align_hybrid_block_size(" in source("vllm.platforms.cpu:CpuPlatform.update_block_size_for_backend")
    text = source("vllm.platforms.interface:Platform._align_hybrid_block_size")
    assert "cache_config.block_size,\n            )" in text.split("kernel_block_alignment_size = max(")[1]
    assert "if cache_config.block_size < attn_block_size:" in text


PATCHES = {
    "EngineArgs.add_cli_args": "vllm_seams/engine_args.py",
    "EngineArgs.from_cli_args": "vllm_seams/engine_args.py",
    "EngineArgs.create_engine_config": "vllm_seams/engine_args.py",
    "CPUModelRunner.sample_tokens": "vllm_seams/cpu_runner.py",
    "Worker.initialize_from_config": "vllm_seams/worker.py",
    "CPUModelRunner._build_attention_metadata": "vllm_seams/row_classes.py",
    "InputProcessor.process_inputs": "vllm_seams/requests.py",
    "OpenAIServingChat.chat_completion_stream_generator": "vllm_seams/usage.py",
    "OpenAIServingChat.chat_completion_full_generator": "vllm_seams/usage.py",
    "OpenAIServingCompletion.completion_stream_generator": "vllm_seams/usage.py",
    "OpenAIServingCompletion.request_output_to_completion_response": "vllm_seams/usage.py",
    "CPUModelRunner._input_fits_in_drafter": "vllm_seams/drafts.py",
    "CPUModelRunner.propose_draft_token_ids": "vllm_seams/drafts.py",
    "CPUModelRunner._zero_block_ids": "vllm_seams/block_memory.py",
    "gpu_model_runner.copy_kv_cache_blocks_inplace": "vllm_seams/block_memory.py",
    "Worker.determine_available_memory": "vllm_seams/gpu.py",
    "EngineCore.kv_eviction_states": "vllm_seams/engine_core.py",
    "model_arch_config.rswa_window": "attention/prompt_lengths.py",
}
"""Everything of vLLM's that we overwrite, and where. The other ledger, with reasons: vllm_seams/__init__.py."""

OPTIONS = {
    "cache_config.prefix_cache_retention_interval",
    "scheduler_config.disable_hybrid_kv_cache_manager",
    "cache_config.block_size",
}
"""A user could have given them; we set what was left open."""


def overwritten(path: Path) -> set[str]:
    """`Class.name` and `config.name` that a file assigns to, of classes imported from vLLM and of its configurations."""
    tree = ast.parse(path.read_text())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vllm")]
    theirs = {alias.asname or alias.name for n in froms for alias in n.names}
    assigned = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    found = set()
    for target in (t for t in assigned if isinstance(t, ast.Attribute)):
        owner = target.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        if (isinstance(owner, ast.Name) and name in theirs) or (isinstance(owner, ast.Attribute) and "_config" in name):
            found.add(f"{name}.{target.attr}")
    return found


def test_every_patch_is_in_both_ledgers():
    files = {path: str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    found = {name: where for path, where in files.items() for name in overwritten(path)}
    ours = {name: where for name, where in found.items() if not name.endswith("._momentkv_patched")}
    assert ours.keys() - PATCHES.keys() == OPTIONS
    assert {name: where for name, where in ours.items() if name not in OPTIONS} == PATCHES
    rows = re.findall(r"^\| (\w+\.\w+) \| (\S+) \|", (PACKAGE / "vllm_seams/__init__.py").read_text(), re.M)
    assert {name: where if "/" in where else f"vllm_seams/{where}" for name, where in rows} == PATCHES
    methods = sum(name[0].isupper() for name in PATCHES)
    functions = sum(name.split(".")[0].endswith("_runner") for name in PATCHES)
    words = {14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen"}
    said = words[methods] + " patched methods, " + {1: "one patched function"}[functions]
    said += " and " + {1: "one value"}[len(PATCHES) - methods - functions]
    assert said in (PACKAGE.parent / "docs/design.md").read_text()


def test_the_runner_gives_prompt_lengths_to_builders_where_a_model_asks():
    """What setting rswa_window is for, and that nothing else on a CPU worker reads it."""
    assert "rswa_window" in {f.name for f in dataclasses.fields(find("vllm.config.model_arch:ModelArchitectureConfig"))}
    assert "rswa_prefix_lens" in source("vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata")
    assert "rswa" not in source("vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build")


def test_both_gpu_runners_give_prompt_lengths_to_builders():
    """attention/prompt_lengths.py: V2 from its request table on the device, and none while it captures graphs; vLLM's own mask reads
    what its builder found in its constructor."""
    v2 = Path(find("vllm:__file__")).parent / "v1/worker/gpu"
    assert "prompt_lens = self.req_states.prompt_len.gpu[idx_mapping]" in (v2 / "model_runner.py").read_text()
    assert "rswa_prefix_lens=input_batch.prompt_lens" in (v2 / "model_states/default.py").read_text()
    build = source("vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build")
    assert "if self.rswa_window is not None and rswa_prefix_lens is not None" in build


CACHE_AND_GRAPHS = ("initialize_kv_cache", "capture_model")


def test_both_runners_have_what_measuring_asks_of_them():
    """attention/measuring.py, under a KV cache that stays and before graphs are captured (vllm_seams/worker.py)."""
    folder = Path(find("vllm:__file__")).parent / "v1/worker"
    v1, v2 = (folder / "gpu_model_runner.py").read_text(), (folder / "gpu/model_runner.py").read_text()
    asked = (
        "device",
        "vllm_config",
        "model_config",
        "compilation_config",
        "lora_config",
        "max_num_tokens",
        "supports_mm_inputs",
    )
    for text in (v1, v2):
        for name in asked:
            assert f"self.{name} = " in text, name
        assert "self.attn_groups" in text and "LoRAModelRunnerMixin" in text and "cudagraph_runtime_mode=" in text
    assert "self.mrope_positions = self._make_buffer(" in v1 and "self.model_state = " not in v1
    assert "self.model_state = init_model_state(" in v2
    assert "self.rope_state = get_rope_state(" in (folder / "gpu/model_states/default.py").read_text()
    assert (
        "self.positions = torch.zeros(\n            (num_dims, max_num_tokens + 1)"
        in (folder / "gpu/mm/rope.py").read_text()
    )
    for text, call in ((v1, "self"), ((folder / "gpu/cudagraph_utils.py").read_text(), "runner")):
        assert f"{call}.initialize_kv_cache(minimal_config, is_profiling=True)" in text
    cache, graphs = (
        (folder / "gpu_worker.py").read_text().split(f"self.model_runner.{name}(") for name in CACHE_AND_GRAPHS
    )
    assert len(cache) == len(graphs) == 2 and len(cache[0]) < len(graphs[0])
    assert "initialize_from_config" not in (folder / "cpu_worker.py").read_text()


def test_a_backend_chosen_by_name_is_asked_for_its_own():
    """attention/cuda_choice.py names another one between these two."""
    text = (Path(find("vllm:__file__")).parent / "platforms/cuda.py").read_text()
    named = text.split("if selected_backend is not None:")[1].split("# No selected backend")[0]
    assert named.index("backend_class.validate_configuration(") < named.index("return _backend_cls_path(backend_class)")
    assert "module, qualname = backend_cls.full_cls_name()" in text


def test_flash_attention_reads_our_cache_and_plans_no_batch_that_is_built_fast():
    """attention/cuda_flash.py: a key and its value side by side, as CacheView.of_vllm_gpu has them; one buffer for plans."""
    flash = "vllm.v1.attention.backends.flash_attn"
    assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in source(f"{flash}:FlashAttentionImpl.forward")
    build = source(f"{flash}:FlashAttentionMetadataBuilder.build")
    assert "self.aot_schedule and not fast_build" in build and "self.rswa_window is not None" in build
    store = source(f"{flash}:FlashAttentionMetadataBuilder._store_scheduler_metadata")
    assert "if self.use_full_cuda_graph and scheduler_metadata is not None:" in store
    assert "if not aot_schedule:\n            return None" in source(
        f"{flash}:FlashAttentionMetadataBuilder._get_scheduler_metadata"
    )


def test_page_copies_run_before_the_step_and_read_before_they_write():
    """What prefix caching stands on: copies of one list are one parallel assignment, made before the step's own stores."""
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    cache = torch.arange(4.0).view(4, 1)
    copy_kv_cache_blocks_inplace([cache], 4, [(0, 1), (1, 2)])
    assert cache.flatten().tolist() == [0, 0, 1, 3]
    assert "copy_kv_cache_blocks_inplace" in source("vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states")


def test_vllm_keeps_both_ends_of_a_copy_until_the_list_is_handed_over():
    text = source("vllm.v1.core.kv_cache_manager:KVCacheManager.take_kv_cache_block_copies")
    assert "retained_blocks = [block for pair in pending_copies for block in pair]" in text


def test_drafters_follow_every_step_that_fits():
    """vllm_seams/drafts.py: what is asked before every proposal, where the number of drafts comes from, and that a drafter which
    shall draft nothing still computes the tokens of the step."""
    sample = source("vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens")
    assert sample.index("self._input_fits_in_drafter(") < sample.index("propose_draft_token_ids(sampled_token_ids)\n")
    propose = source("vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids")
    assert "num_spec_tokens_to_schedule = scheduler_output.num_spec_tokens_to_schedule" in propose
    passes = source("vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.propose")
    assert passes.index("self.model(**model_kwargs)") < passes.index("if self.num_speculative_tokens == 0:")
    assert "build_metadata_for_drafting(" in source(
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata"
    )


def test_a_draft_model_is_built_with_a_config_of_its_own():
    """attention/spec_hook.py tells it from the model's by its model_config."""
    own = source("vllm.v1.spec_decode.draft_model:DraftModelProposer._create_draft_vllm_config")
    assert "model_config=spec.draft_model_config" in own
