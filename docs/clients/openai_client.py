"""The openai client on a server that evicts: a document read as a stream, then a second turn of the conversation.

python docs/clients/openai_client.py http://127.0.0.1:8000 MODEL DOCUMENT
"""

import sys
from pathlib import Path

import openai


def main(url: str, model: str, document: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")  # the server's --api-key, if it has one
    question = f"{Path(document).read_text()}\n\nWhat is this text about? Answer in two sentences."
    messages = [{"role": "user", "content": question}]
    answer = ""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=60,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        answer += piece
        print(piece, end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} in the answer]")
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Give it a title."}]
    said = client.chat.completions.create(model=model, messages=messages, max_tokens=20, temperature=0)
    print(f"{said.choices[0].message.content}\n[{said.usage.prompt_tokens} prompt tokens]")


if __name__ == "__main__":
    main(*sys.argv[1:])
