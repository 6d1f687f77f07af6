"""How far a head looks, measured on random tokens that come twice, with others between, and where its queries point.

A head that copies finds the first time, a head that looks at its neighbours or at the first tokens does not care. What a head
gives to tokens that are neither near nor the first ones is its reach; head_budgets.py makes budgets of it. No text is read, so
reach is the model's alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momentkv_vllm.key_rounding import moment_of
from momentkv_vllm.softcap import capped

REPEATED, BETWEEN = 384, 256
"""Tokens that come twice, and those between; less of each where the model's context is shorter."""
NEAR_SHARE = 4
"""Near are the last tokens before the query: as many as 1 / 4 of all."""
FIRST_TOKENS = 4
"""Not counted: most heads rest on them (attention sinks)."""
SEED = 0


@dataclass
class Probe:
    """Attends in a layer's place, and finds its reach: [kv heads], the largest of a KV head's query heads.

    tokens: of the whole text, of which every call brings the next ones; 0: there is one call.
    window: a query sees so many tokens, itself the last one; 0: all. chunk: those of its own chunk of so many; 0 likewise.
    softcap: as softcap.py has it. sinks: [query heads] logits of the layer's own sink tokens (sinks.py).
    keys, values: [kv heads, tokens so far, head_dim]. queries: [kv heads, head_dim, head_dim] sum of q q^T so far.
    far: [kv heads, query heads of each] attention that went far so far.
    """

    scale: float
    tokens: int = 0
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | float = 0.0
    far: Tensor | float = 0.0

    @property
    def reach(self) -> Tensor:
        return self.far.amax(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """Causal attention of one sequence into `output` [tokens, num_heads, head_dim], like `query`; key, value:
        [tokens, num_kv_heads, head_dim]."""
        k, v = (x.transpose(0, 1) for x in (key, value))
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 1)
        self.values = v if self.values is None else torch.cat([self.values, v], 1)
        return self.read(query, self.keys, self.values, output)

    def read(self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> Tensor:
        """Likewise with all that was given so far. The queries are the last tokens'."""
        queries, seen, device = query.shape[0], keys.shape[1], query.device
        total, groups = self.tokens or seen, query.shape[1] // keys.shape[0]
        places = torch.arange(seen, device=device)
        at = torch.arange(seen - queries, seen, device=device).unsqueeze(1)
        self.queries = self.queries + moment_of(query, keys.shape[0])
        counted = (places >= FIRST_TOKENS) & (at - places >= total // NEAR_SHARE) & (at >= total - _repeated(total))
        # [kv heads, query heads of each, queries, keys]
        of_heads = query.float().unflatten(1, (-1, groups)).permute(1, 2, 0, 3)
        scores = of_heads @ keys.float().unsqueeze(1).transpose(-1, -2) * self.scale
        logits = capped(scores, self.softcap).masked_fill_(self._hidden(at, places), -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float().view(-1, groups, 1, 1).expand(-1, -1, queries, 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1)[..., :seen]
        output.copy_((weights @ values.float().unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2))
        self.far = self.far + (weights * counted).sum((-2, -1)) / _repeated(total)
        return output

    def _hidden(self, at: Tensor, places: Tensor) -> Tensor:
        """[queries, keys] bool of queries `at` [queries, 1] and keys at `places` [keys]."""
        hidden = places > at
        if self.window:
            hidden |= at - places >= self.window
        if self.chunk:
            hidden |= at // self.chunk != places // self.chunk
        return hidden


def _repeated(tokens: int) -> int:
    """Of the tokens at the end, those that have come before."""
    return tokens * REPEATED // (2 * REPEATED + BETWEEN)


def random_tokens(vocabulary: int, longest: int) -> Tensor:
    """[tokens] int64."""
    tokens = min(2 * REPEATED + BETWEEN, longest)
    repeated, generator = _repeated(tokens), torch.Generator().manual_seed(SEED)
    once = torch.randint(vocabulary, (tokens - repeated,), generator=generator)
    return torch.cat([once, once[:repeated]])
