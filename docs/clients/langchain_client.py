"""LangChain's ChatOpenAI on a server that evicts: a chain over a document, as a stream and as a batch.

python docs/clients/langchain_client.py http://127.0.0.1:8000 MODEL DOCUMENT
"""

import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

QUESTIONS = ("What is this text about?", "Who is the text written for?")


def main(url: str, model: str, document: str) -> None:
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=40)
    prompt = ChatPromptTemplate([("user", "{text}\n\n{question} Answer in one sentence.")])
    chain = prompt | chat | StrOutputParser()
    inputs = [{"text": Path(document).read_text(), "question": question} for question in QUESTIONS]
    for piece in chain.stream(inputs[0]):
        print(piece, end="", flush=True)
    print()
    for question, answer in zip(QUESTIONS, chain.batch(inputs), strict=True):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
