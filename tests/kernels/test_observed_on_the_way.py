"""Attention of single queries that is observed on the way gives what attention and a pass over the keys give."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.extend(str(Path(__file__).parents[2] / "benchmarks" / folder) for folder in ("gpu", ""))
import graph  # noqa: E402  no package

from momentkv_vllm.kernels import select  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")


class InTwo(graph.Layer):
    """attend, then observe."""

    def attend(self) -> None:
        attend, lse = self.work.attends[0], torch.empty(self.query.shape[:2])
        self.family.write(self.cache, self.key, self.value, self.slots, self.mass)
        self.family.attend(self.cache, self.query, self.output, lse, attend, self.scale, True)
        self.family.observe(self.cache, self.mass, self.query, lse, attend, self.scale)


@pytest.mark.parametrize(("store", "softcap"), [("model", 0.0), ("int4", 0.0), ("int4", 1.5)])
def test_observed_on_the_way(store, softcap):
    """Rows before, at and behind an event, one that begins again, one that observes nothing."""
    sizes, family = (2, 1, 2, 32, 128), select("triton", "cpu")
    once, twice = graph.Layer(family, "cpu", store, *sizes), InTwo(family, "cpu", store, *sizes)
    once.cache.softcap = twice.cache.softcap = softcap
    # Where the first event comes, and where a later one does: then a quantised store holds tokens.
    for step in (0, 3, 4, once.schedule.retire_tokens + 3):
        for layer in (once, twice):
            layer.prepare(step)
            layer.mass.data.copy_(torch.rand(layer.mass.data.shape, generator=torch.Generator().manual_seed(step)))
            work = layer.work.attends[0]
            work.observe_from[0], work.restart[0] = 0, step == 3
            if step == 4:
                work.observe_from[1], work.restart[1] = 1, False
        before = once.mass.data.clone()
        once.attend(), twice.attend()
        assert torch.equal(once.output, twice.output)
        torch.testing.assert_close(once.mass.data, twice.mass.data, rtol=1e-4, atol=1e-6)
        assert not torch.equal(once.mass.data, before)
        once.retire(once.work.retires[0])
        twice.cache.kv.copy_(once.cache.kv)
