"""One layer of a backend, stepped by hand: its builder, its implementation, a cache."""

import math
from types import SimpleNamespace

import torch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

HEADS, GROUPS, D, PAGE, BUDGET, COLUMNS = 2, 2, 32, 16, 96, 14
TABLE = (torch.randperm(4 * COLUMNS, generator=torch.Generator().manual_seed(1)) + 1).view(4, COLUMNS)
ONE = torch.ones(1)
LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0, _q_scale=ONE, _k_scale=ONE, _v_scale=ONE)


def config_of(model, **eviction):
    eviction = {
        "policy": "momentkv",
        "budget_tokens": BUDGET,
        "correction": "first",
        "observation_tokens": 4,
    } | eviction
    carrier = {"kv_eviction": eviction}
    args = EngineArgs(
        model=str(model), dtype="float32", additional_config=carrier, max_model_len=512, block_size=PAGE, max_num_seqs=4
    )
    return args.create_engine_config()


def new_cache(table):
    """Poisoned pages 0 to the last one of `table`."""
    return torch.full((int(table.max()) + 1, HEADS, PAGE, 2 * D), math.nan)


def new_tokens(count, generator):
    """(query, key, value)"""
    query = torch.randn(count, HEADS * GROUPS, D, generator=generator)
    return query, *(torch.randn(count, HEADS, D, generator=generator) for _ in range(2))


class Side:
    """One backend with a cache and one layer of its own."""

    def __init__(self, config, backend, impl, builder):
        with set_current_vllm_config(config):
            self.impl = impl(HEADS * GROUPS, D, D**-0.5, HEADS, None, None, "auto")
            spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=D, dtype=torch.float32)
            self.builder = builder(backend.customize_spec(spec), [], config, torch.device("cpu"))
        self.cache = new_cache(TABLE)

    def step(self, common, query, key, value):
        """Output of a step, NaN where nothing was written."""
        metadata = self.builder.build(0, common)
        self.impl.do_kv_cache_update(LAYER, key, value, self.cache, common.slot_mapping)
        output = torch.full_like(query, math.nan)
        self.impl.forward(LAYER, query, key, value, self.cache, metadata, output)
        return output


def common_of(lens, new, table=TABLE, prompts=None):
    """Metadata of a step that brings `new[i]` tokens to request i, which then has lens[i] in the pages table[i], of which
    prompts[i] are its prompt."""
    table = table[: len(lens)]
    start = torch.tensor([0, *new]).cumsum(0, dtype=torch.int32)
    positions = [torch.arange(e - n, e) for e, n in zip(lens, new)]
    slots = torch.cat([table[i, p // PAGE] * PAGE + p % PAGE for i, p in enumerate(positions)])
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start, query_start_loc_cpu=start, seq_lens=seq_lens, num_reqs=len(lens), num_actual_tokens=len(slots),
        max_query_len=max(new), max_seq_len=max(lens), block_table_tensor=table.int(), slot_mapping=slots,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        rswa_prefix_lens=None if prompts is None else torch.tensor(prompts, dtype=torch.int32),
    )  # fmt: skip
