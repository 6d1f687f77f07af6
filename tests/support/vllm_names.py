"""What tests take from vLLM and what lies elsewhere in one of the tested releases. The package itself needs no such name."""

try:
    from vllm.v1.core.kv_cache_planning import (  # since 0.33
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        unify_kv_cache_spec_page_size,
    )
except ImportError:
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        unify_kv_cache_spec_page_size,
    )

__all__ = ["get_kv_cache_config_from_groups", "get_kv_cache_groups", "unify_kv_cache_spec_page_size"]
