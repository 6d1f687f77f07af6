"""A real tokenizer and chat template behind `vllm serve --kv-eviction`: pieces of a stream, stop strings, logprobs, grammars."""

import json
import math

import openai
import pytest
from real_model import folder
from running_text import TEXT
from server import Server
from transformers import AutoTokenizer

MODEL = folder.find()
pytestmark = [
    pytest.mark.server, pytest.mark.timeout(900), pytest.mark.skipif(MODEL is None, reason=folder.WHY_NOT),
]  # fmt: skip

OPTIONS = ["--kv-eviction", "momentkv", "--kv-budget", "256", "--max-model-len", "2048", "--dtype", "float32"]
OPTIONS += ["--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "200"]
QUESTION = [{"role": "user", "content": f"{TEXT[:1500]}\n\nWhat is this text about? Answer in two sentences."}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    server = Server(MODEL, *OPTIONS, folder=tmp_path_factory.mktemp("real"), name="smollm2").wait_ready()
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    server.stop()


def chat(client, messages=QUESTION, **settings):
    return client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, **{"max_tokens": 28, **settings}
    )


@pytest.fixture(scope="module")
def whole(client):
    """The answer in one piece, with logprobs."""
    return chat(client, logprobs=True, top_logprobs=3)


def test_the_chat_template_is_the_checkpoints(client, whole):
    ids = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    assert whole.usage.prompt_tokens == len(ids) > 256
    said = client.completions.create(model="smollm2", prompt=ids, max_tokens=28, temperature=0)
    assert said.choices[0].text == whole.choices[0].message.content


def test_logprobs_belong_to_the_tokens_of_the_answer(whole):
    places = whole.choices[0].logprobs.content
    assert len(places) == whole.usage.completion_tokens
    text = b"".join(bytes(place.bytes) for place in places).decode().removesuffix("<|im_end|>")
    assert text == whole.choices[0].message.content
    for place in places:
        top = [t.logprob for t in place.top_logprobs]
        assert top == sorted(top, reverse=True) and place.logprob == top[0]
        assert sum(map(math.exp, top)) <= 1.001


def test_the_pieces_of_a_stream_are_the_whole_answer(client, whole):
    stream = chat(client, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert len(pieces) > 10 and "".join(pieces) == whole.choices[0].message.content


def test_characters_of_several_tokens_are_streamed_whole(client):
    """A grammar makes the model say them; each of these characters is two or three tokens of bytes."""
    want = "漢字 é ☃ " * 3
    settings = {"max_tokens": 60, "extra_body": {"structured_outputs": {"regex": f"({want})"}}}
    assert chat(client, **settings).choices[0].message.content == want
    pieces = [c.choices[0].delta.content or "" for c in chat(client, stream=True, **settings) if c.choices]
    assert len(pieces) > 10 and "".join(pieces) == want and not any("\ufffd" in piece for piece in pieces), pieces


def test_a_stop_string_across_token_borders(client, whole):
    text = whole.choices[0].message.content
    tokens = [place.token for place in whole.choices[0].logprobs.content]
    # The end of one word and the beginning of the next.
    at = next(i for i in range(8, len(tokens)) if len(tokens[i].strip()) > 2 and tokens[i + 1].startswith(" "))
    stop = tokens[at][-2:] + tokens[at + 1][:2]
    for stream in (False, True):
        said = chat(client, stop=[stop], stream=stream)
        if stream:
            chunks = [c.choices[0] for c in said if c.choices]
            answer, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            answer, reason = said.choices[0].message.content, said.choices[0].finish_reason
        assert (answer, reason) == (text[: text.index(stop)], "stop")


def test_tools_and_schemas(client, whole):
    """This model's chat template knows no tools, so they change nothing; a schema holds over a prompt past the budget."""
    schema = {"type": "object", "properties": {"count": {"enum": [3, 5, 8]}}, "required": ["count"]}
    tool = {"type": "function", "function": {"name": "set_count", "parameters": schema}}
    assert "tools" not in AutoTokenizer.from_pretrained(MODEL).chat_template
    said = chat(client, tools=[tool], tool_choice="none")
    assert said.choices[0].message.content == whole.choices[0].message.content
    assert said.usage.prompt_tokens == whole.usage.prompt_tokens
    asked = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    assert json.loads(chat(client, response_format=asked).choices[0].message.content)["count"] in (3, 5, 8)
