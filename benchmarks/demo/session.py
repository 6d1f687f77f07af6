"""One running server, asked through the openai client."""

import concurrent.futures
import re
import threading
import time
from dataclasses import dataclass, field

import openai
from demo.questions import Messages, Question, chat_turns, late, user
from server import Server
from tqdm import tqdm

NAME = "smollm2"
USERS = 4
"""Questions at a time."""
ANSWER_TOKENS, TURN_TOKENS = 32, 60
"""Longest answer to a question, and to a turn of the chat before the last."""


@dataclass(frozen=True)
class Answer:
    """tokens: prompt and answer together, the answer's end token too; logprobs: the answer's tokens under who said them."""

    text: str
    tokens: list[int]
    logprobs: list[float]


@dataclass
class Session:
    """What one server showed. growth: (seconds, KV tokens held) while it reads one document and answers, alone."""

    server: Server
    pool_tokens: int
    answers: list[Answer] = field(default_factory=list)
    growth: list[tuple[float, float]] = field(default_factory=list)
    surprise: float = 0.0
    """Mean -log p per token of stock's answers, read by this server."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)

    @property
    def concurrency(self) -> str:
        """Sequences of the longest length that fit the pool, from the start-up lines."""
        return re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+x)", self.server.log)[1]

    def ask(self, messages: Messages, longest: int = ANSWER_TOKENS) -> Answer:
        said = self.client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=longest, temperature=0, logprobs=True,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        choice = said.choices[0]
        return Answer(
            choice.message.content.strip(),
            said.prompt_token_ids + choice.token_ids,
            [place.logprob for place in choice.logprobs.content],
        )

    def chat(self) -> Messages:
        """All turns but the last, with this server's answers."""
        history: Messages = []
        for turn in tqdm(chat_turns()[:-1], desc=f"{NAME}: chat", unit="turn"):
            history.append(user(turn))
            history.append({"role": "assistant", "content": self.ask(history, TURN_TOKENS).text})
        return history

    def ask_all(self, name: str, questions: list[Question], history: Messages) -> None:
        """The longest question alone and watched, then all by several users at once, the chat's last turn among them."""
        self.watch(max(questions, key=lambda q: len(q.messages[0]["content"])))
        questions = [*questions, late(history)]
        with concurrent.futures.ThreadPoolExecutor(USERS) as users:
            jobs = users.map(lambda q: self.ask(q.messages), questions)
            self.answers = list(tqdm(jobs, desc=f"{name}: answers", total=len(questions), unit="question"))

    def watch(self, question: Question) -> None:
        """Ask alone, and note vLLM's gauge meanwhile."""
        done, began = threading.Event(), time.monotonic()

        def poll() -> None:
            while not done.wait(0.1):
                held = self.server.metrics("vllm:kv_cache")["vllm:kv_cache_usage_perc"] * self.pool_tokens
                self.growth.append((round(time.monotonic() - began, 2), round(held)))

        watcher = threading.Thread(target=poll)
        watcher.start()
        self.ask(question.messages)
        done.set()
        watcher.join()

    def read(self, name: str, answers: list[Answer]) -> None:
        """How likely this server finds what stock said, token by token."""

        def logprobs(answer: Answer) -> list[float]:
            said = self.client.completions.create(
                model=NAME, prompt=answer.tokens, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
            )
            places = said.choices[0].prompt_logprobs[-len(answer.logprobs) :]
            last = answer.tokens[-len(answer.logprobs) :]
            return [place[str(token)]["logprob"] for place, token in zip(places, last, strict=True)]

        with concurrent.futures.ThreadPoolExecutor(USERS) as users:
            jobs = users.map(logprobs, answers)
            found = list(tqdm(jobs, desc=f"{name}: agreement", total=len(answers), unit="answer"))
        self.surprise = surprise(found)


def surprise(logprobs: list[list[float]]) -> float:
    """Mean -log p per token over all answers."""
    flat = [lp for one in logprobs for lp in one]
    return -sum(flat) / len(flat)
