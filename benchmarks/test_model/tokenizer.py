"""The word-level tokenizer of the test model: one vocabulary word is one token, usable as plain text over the API."""

from collections.abc import Sequence
from pathlib import Path

from test_model.documents import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# One user message is the prompt itself: chat and completion requests mean the same.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"


def word_tokenizer(words: Sequence[str], begins: bool = False) -> PreTrainedTokenizerFast:
    """One word is one token. begins: a text gets its <s>."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        first = [("<s>", words.index("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template to `folder`."""
    fast = word_tokenizer(WORDS, begins=True)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
