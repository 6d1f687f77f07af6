"""Entry point `vllm.general_plugins`: vLLM calls `register` once in every process, before it builds a parser or an engine.

Import-light on purpose: vLLM swallows errors raised while this module is imported, but not those raised inside `register`.
"""


def register() -> None:
    """Hook into vLLM: the options always; backend and spec only into a tested vLLM (others refuse the option)."""
    from momentkv_vllm.vllm_seams.engine_args import patch_engine_args
    from momentkv_vllm.vllm_seams.refusals import refuse_untested_vllm

    patch_engine_args()
    try:
        refuse_untested_vllm()
    except ValueError:
        return
    from momentkv_vllm.vllm_seams.registry import register_seams

    register_seams()
