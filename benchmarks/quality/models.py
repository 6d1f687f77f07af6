"""Who answers: an engine in this process, or any OpenAI endpoint."""

import concurrent.futures
import gc
import os
from collections.abc import Sequence
from typing import Any, Protocol

from divergence import Known

TOP = 20
"""Log-probabilities kept per place; vLLM's default upper limit."""


class Answerer(Protocol):
    def answers(self, prompts: Sequence[str], answer_tokens: Sequence[int]) -> list[str]:
        """What the model says, greedily, at most so many tokens each."""

    def continuations(self, texts: Sequence[str], tokens: int) -> tuple[list[Known], float]:
        """Next-token distributions over the last `tokens` tokens of each text, read one by one; the mean of -log p(token)."""

    def close(self) -> None: ...


class InProcess:
    """A vLLM engine of its own; `options` as `vllm.LLM` takes them."""

    def __init__(self, model: str, **options: Any) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from quality.forced import ForcedTokens
        from vllm import LLM

        self.llm = LLM(model, logits_processors=[ForcedTokens], **options)

    def answers(self, prompts: Sequence[str], answer_tokens: Sequence[int]) -> list[str]:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n) for n in answer_tokens]
        return [o.outputs[0].text for o in self.llm.generate(list(prompts), params)]

    def continuations(self, texts: Sequence[str], tokens: int) -> tuple[list[Known], float]:
        from vllm import SamplingParams

        tokenizer = self.llm.get_tokenizer()
        ids = [tokenizer(t).input_ids for t in texts]
        prompts = [{"prompt_token_ids": row[:-tokens]} for row in ids]
        params = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP, extra_args={"forced": row[-tokens:]})
            for row in ids
        ]
        known, loss = [], 0.0
        for row, out in zip(ids, self.llm.generate(prompts, params), strict=True):
            said = out.outputs[0]
            if list(said.token_ids) != row[-tokens:]:
                raise RuntimeError("the engine did not follow the forced tokens")
            for token, place in zip(said.token_ids, said.logprobs, strict=True):
                known.append({t: p.logprob for t, p in place.items()})
                loss -= place[token].logprob
        return known, loss / len(known)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


class Endpoint:
    """An OpenAI-compatible server. Asks several at once; texts are cut at single places (a server cannot be forced)."""

    CUTS = 8

    def __init__(self, url: str, tokenizer: Any, concurrency: int = 8, chat: bool = False) -> None:
        import openai

        self.client = openai.OpenAI(
            base_url=url.rstrip("/") + "/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=2
        )
        self.name = self.client.models.list().data[0].id
        self.tokenizer, self.concurrency, self.chat = tokenizer, concurrency, chat

    def answers(self, prompts: Sequence[str], answer_tokens: Sequence[int]) -> list[str]:
        return self._several(self._answer, list(zip(prompts, answer_tokens, strict=True)))

    def _answer(self, job: tuple[str, int]) -> str:
        prompt, tokens = job
        given = {"model": self.name, "max_tokens": tokens, "temperature": 0}
        if self.chat:
            reply = self.client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **given)
            return reply.choices[0].message.content or ""
        return self.client.completions.create(prompt=prompt, **given).choices[0].text

    def continuations(self, texts: Sequence[str], tokens: int) -> tuple[list[Known], float]:
        jobs = []
        for text in texts:
            ids = self.tokenizer(text).input_ids
            for i in range(self.CUTS):
                at = len(ids) - tokens + i * tokens // self.CUTS
                jobs.append((ids[:at], self.tokenizer.decode(ids[at : at + 1])))
        found = self._several(self._next, jobs)
        # The server names tokens by their text; what is not listed has at most the least listed probability.
        loss = sum(-known.get(word, known.get(f" {word}", min(known.values()))) for (_, word), known in zip(jobs, found, strict=True))
        return found, loss / len(found)

    def _next(self, job: tuple[list[int], str]) -> Known:
        reply = self.client.completions.create(
            model=self.name, prompt=job[0], max_tokens=1, temperature=0, logprobs=TOP
        )
        return reply.choices[0].logprobs.top_logprobs[0]

    def _several(self, ask: Any, jobs: Sequence[Any]) -> list[Any]:
        from tqdm import tqdm

        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, jobs), total=len(jobs), desc=self.name, leave=False))

    def close(self) -> None:
        self.client.close()
