"""What an eviction policy is: one score per candidate token, and what the rest must know of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from momentkv_vllm.moments import Moments

READS = ("means", "covariance", "order", "head")
AS_PUBLISHED = {"store_dtype": "model", "run_tokens": 1, "head_budgets": "equal"}
"""Defaults of other people's methods: tokens as the model has them, one by one, as many of every head. A quantised store is a
setting away."""
NATIVE_SCORES = ("key_direction",)


@dataclass(frozen=True)
class Observation:
    """What is kept of the attention that every token receives.

    queries: "last", those of the last `observation_tokens` before an event; "all", every query since the sequence's start.
        "all" runs our kernels from the first token, and no prefix can come from the cache.
    what: "mass", the sum of softmax weights; "logits", their count, sum and sum of squares (in PyTorch: no C++ kernel has them).

    Raises ValueError on other values, and on the logits of all queries: only mass moves along with a token that stays.
    """

    queries: str = "last"
    what: str = "mass"

    def __post_init__(self) -> None:
        if self.queries not in ("last", "all") or self.what not in ("mass", "logits"):
            raise ValueError(f"{self}: queries is 'last' or 'all', what is 'mass' or 'logits'")
        if (self.queries, self.what) == ("all", "logits"):
            raise ValueError(f"{self}: statistics of logits do not move with the tokens; observe the 'last' queries")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Shape of what is kept per token and KV head: () or (3,)."""
        return (3,) if self.what == "logits" else ()


@dataclass
class Candidates:
    """Tokens competing for the store at one event; rows are (request) x (KV head), all tensors float32.

    keys, values: [rows, heads, tokens, head_dim], store slots first, then the retiring tokens in order; 0 for padding.
    valid:        [rows, tokens] False for padding (rows retire different numbers of tokens), which comes last.
    store_tokens: how many of the tokens are store slots.
    moments:      the running moments before this event; `moments.count` is 0 for a sequence's first event, and then nothing
                  else of them must be read. Means and covariance are there for a policy that `reads` them.
    attention:    [rows, heads, tokens] attention mass as the policy `observes` it, summed over a KV head's query heads;
                  of "logits" [rows, heads, tokens, 3]: count, sum, sum of squares. 0 for padding. None: nothing is observed.
    scale:        softmax scale of the layer.
    softcap:      the layer caps its logits there (softcap.py); 0: it does not.
    run_tokens:   neighbours that stay or leave together.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    store_tokens: int
    moments: Moments
    attention: torch.Tensor | None
    scale: float
    softcap: float = 0.0
    run_tokens: int = 1


class Policy(ABC):
    """An eviction policy: stateless, one instance per layer. It declares what it needs, and `score` does the rest.

    Attributes:
        name: as `--kv-eviction` takes it.
        source: the paper, or "".
        summary: one line: what the score is.
        observes: what it must know of the attention that tokens receive; None: nothing.
        reads: what else its score depends on, of READS. "means" and "covariance" of the moments: a record is kept for them even
            with correction off. "order": a token's place among the candidates. "head": the head's number in its worker, so that
            tensor parallel workers keep other tokens than one worker would.
        native: a score that kernels compute in place of `score`: "key_direction" (key_direction.py), with the attention term if
            the policy observes, which then must observe "mass" and read "means".
        keeps_only_sinks: it never keeps a retired token: the page schedule turns the store into window (StreamingLLM).
        defaults: its own defaults of `EvictionConfig`'s keys; what the user sets goes before.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    summary: ClassVar[str]
    observes: ClassVar[Observation | None] = None
    reads: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[str | None] = None
    keeps_only_sinks: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def score(self, tokens: Candidates) -> torch.Tensor:
        """Importance of every candidate, [rows, heads, tokens] float32, a new tensor; higher = keep. Sinks stay anyhow."""

    @classmethod
    def observes_every_query(cls) -> bool:
        return cls.observes is not None and cls.observes.queries == "all"


def objections(policy: Any) -> list[str]:
    """What is wrong with a policy's declarations; empty = nothing."""
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        return [f"{policy!r} is not a subclass of momentkv_vllm.policies.Policy"]
    found = [f"it declares no {key}" for key in ("name", "summary") if not isinstance(getattr(policy, key, None), str)]
    if policy.__abstractmethods__:
        found.append("it has no method score(tokens)")
    if not isinstance(policy.observes, Observation | None):
        found.append(f"observes is {policy.observes!r}, not an Observation or None")
    if not isinstance(policy.reads, tuple) or not set(policy.reads) <= set(READS):
        found.append(f"reads is {policy.reads!r}, not a tuple of {', '.join(READS)}")
    if policy.native not in (None, *NATIVE_SCORES):
        found.append(f"native is {policy.native!r}; no kernel computes that")
    elif policy.native and policy.observes and not (policy.observes.what == "mass" and "means" in policy.reads):
        found.append(f"native {policy.native!r} needs the observed mass and 'means' in reads")
    elif policy.native and _owner(policy, "native") is not _owner(policy, "score"):
        found.append(
            f"it inherits native {policy.native!r}, and kernels would not compute its own score; set native = None"
        )
    return found


def _owner(policy: type[Policy], attribute: str) -> type:
    """The class that defines what `policy` has under this name."""
    return next(c for c in policy.__mro__ if attribute in vars(c))
