"""What measures heads stays on the model's device: on torch's meta device, where a tensor of the CPU beside it is an error."""

import pytest
import torch

from momentkv_vllm.attention.head_reach import Probe
from momentkv_vllm.attention.measuring import _one_sequence
from momentkv_vllm.head_budgets import HeadBudgets

META = torch.device("meta")


@pytest.mark.parametrize("sinks", [None, torch.zeros(4, device=META)])
def test_a_probe_asks_nothing_of_the_host(sinks):
    probe = Probe(0.2, tokens=24, window=6, softcap=30.0, sinks=sinks)
    for _ in range(3):
        query, key, value = (torch.empty(8, heads, 16, dtype=torch.bfloat16, device=META) for heads in (4, 2, 2))
        output = probe.attend(query, key, value, torch.empty_like(query))
    assert output.device == probe.reach.device == probe.queries.device == META
    assert probe.reach.shape == (2,) and probe.queries.shape == (2, 16, 16)


def test_a_step_s_metadata_lies_where_vllm_has_it():
    step = _one_sequence(4, 12, 3, META)
    there = {name for name, x in vars(step).items() if isinstance(x, torch.Tensor) and x.device == META}
    assert there == {"query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"}


def test_pages_of_a_store_are_known_before_it_moves():
    """Counting them there would wait for the device, which a captured step cannot."""
    heads = HeadBudgets(torch.tensor([8, 24]), torch.tensor([[[0, 0, 0]], [[2, 64, 8]]]), 8).to(META)
    assert heads.places.device == heads.capacity.device == META and heads.pages == 3
