"""The contract that every policy keeps to (momentkv_vllm/testing.py), and policies that break it, each by one fault."""

import pytest
import torch

from momentkv_vllm.policies import Observation, Policy, find, names
from momentkv_vllm.testing import check_policy


@pytest.mark.parametrize("policy", names())
def test_every_policy_keeps_the_contract(policy):
    check_policy(find(policy))


@pytest.mark.parametrize("policy", ["momentkv", "knorm", "keydiff", "h2o", "tova", "expected_attention"])
def test_a_score_belongs_to_the_token_not_to_its_place(policy):
    """What the contract checks only where a policy does not declare otherwise, these do not."""
    assert not {"order", "head"} & set(find(policy).reads)


class Good(Policy):
    """The mean absolute key: what the bad ones below are made from, each by one fault."""

    name, summary = "good", "mean absolute key"

    def score(self, tokens):
        return tokens.keys.abs().mean(-1)


class Nameless(Good):
    name = None


class Strange(Good):
    reads = ("mean",)


class Misled(Good):
    defaults = {"window": 3}


class Illegal(Good):
    defaults = {"prefill": "lazy"}


class Boolean(Good):
    observes = True


class Infinite(Good):
    def score(self, tokens):
        return super().score(tokens).masked_fill(tokens.keys[..., 0] > 0, torch.inf)


class Undeclared(Good):
    """Reads a mean that only exists by luck: the correction keeps a record too."""

    def score(self, tokens):
        return (tokens.keys - tokens.moments.mean_key.unsqueeze(2)).norm(dim=-1)


class TooEarly(Undeclared):
    """Declares it, but reads it before the first event."""

    reads = ("means",)


class Unobserved(Good):
    def score(self, tokens):
        return tokens.attention.clone()


class Flat(Good):
    def score(self, tokens):
        return tokens.keys.abs().mean((1, -1))


class Double(Good):
    def score(self, tokens):
        return super().score(tokens).double()


class Writes(Good):
    def score(self, tokens):
        return tokens.keys.abs_().mean(-1)


class Lends(Good):
    observes = Observation()

    def score(self, tokens):
        return tokens.attention


class Fickle(Good):
    def score(self, tokens):
        return torch.rand(tokens.keys.shape[:3])


class BatchMean(Good):
    def score(self, tokens):
        return super().score(tokens) / super().score(tokens).mean((0, 2), keepdim=True)


class PaddedMean(Good):
    def score(self, tokens):
        return super().score(tokens) / super().score(tokens).mean(2, keepdim=True)


class HeadMean(Good):
    def score(self, tokens):
        return super().score(tokens) / super().score(tokens).sum(1, keepdim=True)


class ByPlace(Good):
    def score(self, tokens):
        return super().score(tokens) + torch.arange(tokens.keys.shape[2])


class OnlySinks(Good):
    keeps_only_sinks = True


class Native(Good):
    observes, reads, native = Observation(), ("means",), "key_direction"


class Heir(find("momentkv")):
    """Its score would never be called."""

    name = "heir"

    def score(self, tokens):
        return tokens.keys.abs().mean(-1)


class Metal(Good):
    native = "metal"


BAD = {
    Nameless: "declares no name",
    Strange: "reads is ('mean',)",
    Misled: "'window'",
    Illegal: "'lazy'",
    Boolean: "not an Observation",
    Metal: "no kernel computes",
    Infinite: "not finite",
    Undeclared: "not finite",
    Unobserved: "score raises AttributeError: 'NoneType'",
    Heir: "inherits native 'key_direction'",
    TooEarly: "count is 0",
    Flat: "is not [rows, heads, tokens]",
    Double: "float64",
    Writes: "changes its candidates",
    Lends: "changes its candidates",
    Fickle: "asked again",
    BatchMean: "others of its batch",
    PaddedMean: "padding",
    HeadMean: "other heads",
    ByPlace: "changes with its place",
    OnlySinks: "keeps_only_sinks",
    Native: "native",
}


def test_the_contract_lets_a_good_policy_pass():
    check_policy(Good)


def test_a_policy_may_inherit_the_default_one_s_score_or_give_up_its_kernel():
    check_policy(type("Same", (find("momentkv"),), {"name": "same", "defaults": {"sink_tokens": 8}}))
    check_policy(type("Own", (Heir,), {"native": None}))


@pytest.mark.parametrize("policy", BAD, ids=lambda p: p.__name__)
def test_the_contract_finds_each_fault(policy):
    with pytest.raises(AssertionError) as error:
        check_policy(policy)
    assert BAD[policy] in str(error.value)


@pytest.mark.parametrize(("queries", "what"), [("all", "logits"), ("some", "mass"), ("last", "weights")])
def test_an_observation_that_nobody_makes_is_refused(queries, what):
    with pytest.raises(ValueError, match=f"queries='{queries}', what='{what}'"):
        Observation(queries, what)
