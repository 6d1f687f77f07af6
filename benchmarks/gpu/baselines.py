"""What others need for attention over the same shape: torch SDPA on contiguous KV, FlashAttention 3 and FlashInfer on pages."""

import importlib.util
from collections.abc import Callable

import torch
from cases import Case


def sdpa(case: Case) -> Callable[[], object]:
    """torch's scaled_dot_product_attention over contiguous keys and values (no pages: better than a server's lot)."""
    s = case.shape
    keys, values = (
        torch.randn(s.rows, s.kv_heads, s.slots, s.head_dim, dtype=s.dtype, device=case.device) for _ in range(2)
    )
    query = case.query.view(s.rows, 1, -1, s.head_dim).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, keys, values, enable_gqa=s.groups > 1)


def flashinfer(case: Case) -> Callable[[], object]:
    """FlashInfer's paged decode over pages of the same size."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    s, int32 = case.shape, torch.int32
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=case.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=s.groups >= 4)
    pages = case.pages.shape[1]
    starts = torch.arange(s.rows + 1, dtype=int32, device=case.device) * pages
    lasts = torch.full((s.rows,), (s.slots - 1) % s.page_size + 1, dtype=int32, device=case.device)
    heads = (s.kv_heads * s.groups, s.kv_heads, s.head_dim, s.page_size)
    wrapper.plan(starts, case.pages.flatten().to(int32), lasts, *heads, q_data_type=s.dtype, kv_data_type=s.dtype)
    kv = torch.stack([case.cache.keys, case.cache.values], 1).contiguous()
    return lambda: wrapper.run(case.query, kv)


def xformers(case: Case) -> Callable[[], object]:
    """xformers' memory-efficient attention over contiguous keys and values."""
    from xformers.ops import memory_efficient_attention

    s = case.shape
    shape = (s.rows, s.slots, s.kv_heads, 1, s.head_dim)
    keys, values = (torch.randn(shape, dtype=s.dtype, device=case.device) for _ in range(2))
    keys, values = (x.expand(-1, -1, -1, s.groups, -1) for x in (keys, values))
    query = case.query.view(s.rows, 1, s.kv_heads, s.groups, s.head_dim)
    return lambda: memory_efficient_attention(query, keys, values)


def flash_attention_3(case: Case) -> Callable[[], object]:
    """vLLM's FlashAttention 3 over the same pages, which is what stock vLLM runs on a Hopper GPU."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    s, int32 = case.shape, torch.int32
    starts = torch.arange(s.rows + 1, dtype=int32, device=case.device)
    lens = torch.full((s.rows,), s.slots, dtype=int32, device=case.device)
    keys, values = (x.transpose(1, 2) for x in (case.cache.keys, case.cache.values))
    pages = case.pages.to(int32)
    return lambda: flash_attn_varlen_func(
        case.query, keys, values, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=s.slots, seqused_k=lens,
        block_table=pages, softmax_scale=case.scale, causal=True, fa_version=3,
    )  # fmt: skip


def causal(tokens: int, s, device: str) -> Callable[[], object]:
    """Attention of one prompt over itself: torch's flash attention, contiguous."""
    heads = s.kv_heads * s.groups
    query = torch.randn(1, heads, tokens, s.head_dim, dtype=s.dtype, device=device)
    keys, values = (torch.randn(1, s.kv_heads, tokens, s.head_dim, dtype=s.dtype, device=device) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, keys, values, is_causal=True, enable_gqa=s.groups > 1)


def available() -> dict[str, Callable[[Case], Callable[[], object]]]:
    found = {"sdpa": sdpa}
    for module, make in (("vllm", flash_attention_3), ("flashinfer", flashinfer), ("xformers", xformers)):
        if importlib.util.find_spec(module):
            found[make.__name__] = make
    return found
