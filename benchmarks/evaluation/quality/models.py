"""Who answers: an engine in this process, or a server."""

import concurrent.futures
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

from divergence import Known
from evaluation.quality.questions import Question
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

TOP = 20
"""Log-probabilities kept per place; vLLM's default upper limit."""
FORCED_TOKENS = 64
"""Length of the end of a text that is read token by token."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """What a server would make of it."""
    if not question.chat:
        return tokenizer(question.prompt).input_ids
    said = [{"role": "user", "content": question.prompt}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)


class InProcess:
    """A vLLM engine of its own; `options` as `vllm.LLM` takes them."""

    def __init__(self, model: str, **options: Any) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        from momentkv_vllm.calibrate.forced import ForcedTokens

        self.llm = LLM(model, logits_processors=[ForcedTokens], **options)
        self.tokenizer = self.llm.get_tokenizer()

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model says, greedily."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt_ids(self.tokenizer, q)} for q in questions]
        params = [SamplingParams(temperature=0, max_tokens=q.answer_tokens) for q in questions]
        return [o.outputs[0].text for o in self.llm.generate(prompts, params)]

    def continuations(self, texts: Sequence[str]) -> tuple[list[Known], float]:
        """Next-token distributions over the last FORCED_TOKENS of each text, decoded one by one; mean of -log p(token)."""
        from vllm import SamplingParams

        ids = [self.tokenizer(t).input_ids for t in texts]
        prompts = [{"prompt_token_ids": row[:-FORCED_TOKENS]} for row in ids]
        settings = {"temperature": 0, "max_tokens": FORCED_TOKENS, "ignore_eos": True, "logprobs": TOP}
        params = [SamplingParams(**settings, extra_args={"forced": row[-FORCED_TOKENS:]}) for row in ids]
        known, loss = [], 0.0
        for row, out in zip(ids, self.llm.generate(prompts, params), strict=True):
            said = out.outputs[0]
            if list(said.token_ids) != row[-FORCED_TOKENS:]:
                raise RuntimeError("the engine did not follow the forced tokens")
            for token, place in zip(said.token_ids, said.logprobs, strict=True):
                known.append({f"token_id:{t}": p.logprob for t, p in place.items()})
                loss -= place[token].logprob
        return known, loss / len(known)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


class Endpoint:
    """A server at `url` (without /v1), asked through the openai client, several requests at a time.

    Questions need nothing but OpenAI's API. `continuations` needs vLLM's extensions of it.
    """

    PLACES = 8
    """Of a text. A server cannot be made to decode a given text, so each place is a prompt of its own: what is judged is
    eviction while the prompt is read, and nothing at all with `full` prefill."""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, concurrency: int = 8) -> None:
        import openai

        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key, timeout=3600)
        self.model = self.client.models.list().data[0].id
        self.tokenizer, self.concurrency = tokenizer, concurrency

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model says, greedily."""
        return self._several(self._answer, questions)

    def _answer(self, question: Question) -> str:
        given = {"model": self.model, "max_tokens": question.answer_tokens, "temperature": 0}
        if question.chat:
            said = [{"role": "user", "content": question.prompt}]
            return self.client.chat.completions.create(messages=said, **given).choices[0].message.content or ""
        return self.client.completions.create(prompt=question.prompt, **given).choices[0].text

    def continuations(self, texts: Sequence[str]) -> tuple[list[Known], float]:
        """Next-token distributions at PLACES of the end of each text; mean of -log p(token)."""
        ids = [self.tokenizer(t).input_ids for t in texts]
        step = FORCED_TOKENS // self.PLACES
        places = [(row[:at], row[at]) for row in ids for at in range(len(row) - FORCED_TOKENS, len(row), step)]
        found = self._several(self._next, places)
        return [known for known, _ in found], sum(loss for _, loss in found) / len(found)

    def _next(self, place: tuple[list[int], int]) -> tuple[Known, float]:
        """Log-probabilities after the tokens, and -log p of the token that follows, which the server is made to say."""
        before, token = place
        extensions = {"allowed_token_ids": [token], "return_tokens_as_token_ids": True, "ignore_eos": True}
        reply = self.client.completions.create(
            model=self.model, prompt=before, max_tokens=1, temperature=0, logprobs=TOP, extra_body=extensions
        )
        said = reply.choices[0].logprobs
        if said.tokens != [f"token_id:{token}"]:
            raise RuntimeError(
                f"{self.client.base_url} answered {said.tokens} instead of token_id:{token}: KL and perplexity need vLLM's "
                "allowed_token_ids and return_tokens_as_token_ids; leave out --tasks text for another server"
            )
        return said.top_logprobs[0], -said.token_logprobs[0]

    def _several(self, ask: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, jobs), total=len(jobs), desc=str(self.client.base_url), leave=False))

    def close(self) -> None:
        self.client.close()
