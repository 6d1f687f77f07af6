"""Three methods of EngineArgs, wrapped so that `--kv-eviction` exists and always takes effect (ledger: vllm_seams/__init__.py).

vLLM loads general plugins before it builds its parser (AsyncEngineArgs.add_cli_args), so these are in place in time.
"""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from momentkv_vllm.budget_classes import budgets_of, written
from momentkv_vllm.config import CONFIG_KEY, EvictionConfig
from momentkv_vllm.environment import unknown_variables
from momentkv_vllm.model_layers import has_windows, hides_tokens, keeps_states, named_windows
from momentkv_vllm.policies import OFF, builtins, names, origin
from momentkv_vllm.refuse import refuse
from momentkv_vllm.versions import CPU_BUILD, TESTED_VLLM, installed_vllm
from momentkv_vllm.vllm_seams.bypasses import choose_model_runner, leave_model_runner_to_vllm
from momentkv_vllm.vllm_seams.drafts import say_where_nothing_is_drafted
from momentkv_vllm.vllm_seams.gpu import choose_backend
from momentkv_vllm.vllm_seams.hybrids import align_blocks, say_what_blocks_cost
from momentkv_vllm.vllm_seams.kv_dtypes import keeps_fp8
from momentkv_vllm.vllm_seams.refusals import STATE_PAGES, WIDE_PAGE_TOKENS, refuse_unsupported, refuse_untested_vllm

logger = logging.getLogger(f"vllm.{__name__}")

API_SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""Imported in processes that answer over HTTP, before they make their configuration."""


def patch_engine_args() -> None:
    """Install the three wrappers; calling it again does nothing."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_momentkv_patched", False):
        return
    add, parse, create = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config

    @functools.wraps(add)
    def add_cli_args(parser: Any) -> Any:
        return _add_options(add(parser))

    @functools.wraps(parse)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = parse(cls, args)
        _carry_options(engine_args, args)
        return engine_args

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = EvictionConfig.from_dict((self.additional_config or {}).get(CONFIG_KEY))
        if not config.active:
            leave_model_runner_to_vllm()
            return create(self, *args, **kwargs)
        return _evicting_config(self, config, functools.partial(create, self, *args, **kwargs))

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    EngineArgs.from_cli_args = classmethod(from_cli_args)
    EngineArgs.create_engine_config = create_engine_config
    EngineArgs._momentkv_patched = True


def _evicting_config(engine_args: Any, config: EvictionConfig, create: Callable[[], Any]) -> Any:
    """vLLM's configuration for a server that evicts; `create` makes it of `engine_args`. Raises ValueError on what cannot."""
    for name in unknown_variables():
        logger.warning("momentkv: the environment variable %s is unknown, docs/operations.md lists ours", name)
    refuse_untested_vllm()
    _say_how_vllm_was_tested()
    choose_model_runner()
    chose_caching = engine_args.enable_prefix_caching is None
    backend, chose_page_size = choose_backend(engine_args), _set_defaults(engine_args, config)
    vllm_config = create()
    if chose_page_size and engine_args.block_size % WIDE_PAGE_TOKENS and keeps_fp8(vllm_config):
        vllm_config = _with_wide_pages(engine_args, create, "momentkv: the KV cache is fp8, --block-size is %d")
    if keeps_states(vllm_config.model_config):
        vllm_config = _hybrid_config(engine_args, vllm_config, create if chose_caching else None)
    _say_which_windows_are_none(vllm_config.model_config)
    if has_windows(vllm_config.model_config):
        if chose_page_size and engine_args.block_size % WIDE_PAGE_TOKENS:
            said = "momentkv: the model has layers with a window, --block-size is %d"
            vllm_config = _with_wide_pages(engine_args, create, said)
        _keep_windows(vllm_config, engine_args.disable_hybrid_kv_cache_manager)
    refuse_unsupported(vllm_config, config, backend)
    say_where_nothing_is_drafted(vllm_config, config)
    if keeps_states(vllm_config.model_config):
        say_what_blocks_cost(vllm_config, config)
    # Imported late: torch and prometheus must not be touched by processes that only parse options.
    from momentkv_vllm.metrics import serve_metrics
    from momentkv_vllm.vllm_seams.settle import settled_config

    settled = settled_config(vllm_config, config)
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: settled.to_dict()}
    choose_scheduler(vllm_config)

    serve_metrics()
    if API_SERVER in sys.modules:
        from momentkv_vllm.vllm_seams.usage import patch_usage

        patch_usage()
    return vllm_config


def _add_options(parser: Any) -> Any:
    keys = [f.name for f in fields(EvictionConfig)]
    group = parser.add_argument_group(
        title="KV eviction (momentkv)", description="A fixed KV budget per sequence; evicted tokens become moments."
    )
    group.add_argument(
        "--kv-eviction",
        choices=[OFF, *names()],
        default=None,
        help=_policies_help(),
    )
    group.add_argument(
        "--kv-budget",
        type=_budget,
        default=None,
        metavar="TOKENS",
        help="KV tokens per sequence, moment state included; or several, of which a request chooses by vllm_xargs "
        "{'kv_budget': ...} and the first is the default: 1024,4096,off or small=1024,exact=off.",
    )
    group.add_argument(
        "--kv-eviction-config",
        type=json.loads,
        default=None,
        help="Further settings as JSON or dotted keys, e.g. --kv-eviction-config.window_tokens 64. Keys: "
        f"{', '.join(k for k in keys if not k.startswith(('policy', 'budget')))}. window_tokens and retire_tokens may be auto.",
    )
    return parser


def _budget(text: str) -> int | dict[str, int | str]:
    """Of one class, or of several by name."""
    try:
        return int(text) if text.isdecimal() else written(budgets_of(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _policies_help() -> str:
    """What each name of `--kv-eviction` means; code of other packages is not imported for that."""
    known = builtins()
    said = [f"{n}: {known[n].summary}" if n in known else f"{n}: of {origin(n)}" for n in names()]
    return f"Which tokens stay. {OFF}: stock vLLM. {'. '.join(said)}.".replace("%", "%%")


def _carry_options(engine_args: Any, args: argparse.Namespace) -> None:
    """Move our three options into additional_config, vLLM's carrier to every process."""
    given = getattr(args, "kv_eviction_config", None) or {}
    if not isinstance(given, dict):
        refuse(f"--kv-eviction-config {given!r} is not a JSON object", "write e.g. '{\"window_tokens\": 64}'")
    options: dict[str, Any] = dict(given)
    budget = getattr(args, "kv_budget", None)
    for key, value in (
        ("policy", getattr(args, "kv_eviction", None)),
        ("budgets" if isinstance(budget, dict) else "budget_tokens", budget),
    ):
        if value is None:
            continue
        if options.get(key, value) != value:
            refuse(f"--kv-eviction-config.{key}={options[key]!r} contradicts the flag's {value!r}", "give one")
        options[key] = value
    if not options:
        return
    carrier = dict(engine_args.additional_config or {})
    merged = {**carrier.get(CONFIG_KEY, {}), **options}
    engine_args.additional_config = {**carrier, CONFIG_KEY: EvictionConfig.from_dict(merged).to_dict()}
    # Further API server processes get `args` and parse them before they have loaded us (EngineArgs.__post_init__).
    args.additional_config = engine_args.additional_config


def _set_defaults(engine_args: Any, config: EvictionConfig) -> bool:
    """Choose what the user left open, in ways that eviction needs; said in one line each. True if that was the page size."""
    choose_block_size = engine_args.block_size is None
    if config.state_folder and not engine_args.worker_extension_cls:
        engine_args.worker_extension_cls = STATE_PAGES
    if choose_block_size:
        engine_args.block_size = config.default_page_tokens
        logger.info("momentkv: --block-size not given, using %d", engine_args.block_size)
    if engine_args.enable_prefix_caching is None and config.policy_class.observes_every_query():
        engine_args.enable_prefix_caching = False
        logger.warning(
            "momentkv: prefix caching is switched off: policy %s must observe every query of a sequence", config.policy
        )
    engine_args.additional_config = {**engine_args.additional_config, CONFIG_KEY: config.to_dict()}
    return choose_block_size


def _say_how_vllm_was_tested() -> None:
    how = TESTED_VLLM.get(installed_vllm(), CPU_BUILD)
    if how != CPU_BUILD:
        logger.warning("momentkv: vLLM %s was tested in part: %s", installed_vllm(), how)


def _with_wide_pages(engine_args: Any, create: Callable[[], Any], said: str) -> Any:
    engine_args.block_size = WIDE_PAGE_TOKENS
    logger.info(said, engine_args.block_size)
    return create()


def _say_which_windows_are_none(model: Any) -> None:
    for window in sorted(w for w in named_windows(model) if not hides_tokens(w, model)):
        logger.info(
            "momentkv: the sliding window of %d tokens hides nothing with --max-model-len %d: its layers evict like any other",
            window, model.max_model_len,
        )  # fmt: skip


def _hybrid_config(engine_args: Any, vllm_config: Any, create: Callable[[], Any] | None) -> Any:
    """The configuration of a model some of whose layers keep states, with vLLM's blocks for it; without prefix caching unless
    the user chose (`create` None)."""
    if create and vllm_config.cache_config.enable_prefix_caching:
        engine_args.enable_prefix_caching = False
        logger.warning(
            "momentkv: prefix caching is switched off: the states of this model's other layers are found at the ends of vLLM's "
            "large blocks only; --enable-prefix-caching insists"
        )
        vllm_config = create()
    align_blocks(vllm_config)
    # States at every block, not at the end of the prompt alone: hits end before the first eviction.
    _keep_windows(vllm_config, engine_args.disable_hybrid_kv_cache_manager)
    return vllm_config


def _keep_windows(vllm_config: Any, disable_hybrid_manager: bool | None) -> None:
    """Let layers with windows be found in the prefix cache at every page, unless the user chose where: vLLM's default (0) keeps
    their windows at the end of the prompt only, but hits end before the first eviction. And let them free what lies behind
    the window, unless the user did not want that: vLLM's default keeps it for layers that attend in chunks."""
    if vllm_config.cache_config.prefix_cache_retention_interval == 0:
        vllm_config.cache_config.prefix_cache_retention_interval = None
    if disable_hybrid_manager is None and vllm_config.model_config.attention_chunk_size is not None:
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False


def choose_scheduler(vllm_config: Any) -> None:
    """The scheduler that knows the page schedule; a user's own one stays (refusals.py says what that rules out)."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        name = "AsyncMomentKVScheduler" if scheduler.async_scheduling else "MomentKVScheduler"
        scheduler.scheduler_cls = f"momentkv_vllm.block_manager.scheduler.{name}"
