"""The tokenizer of the example with tools: a token per character, and one for each piece that every call has."""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, END, UNKNOWN, START = "<pad>", "<|im_end|>", "<unk>", "<|im_start|>"
SPECIAL = [PAD, END, UNKNOWN, START]
CALL, CALL_END = "<tool_call>", "</tool_call>"
EXPRESSION, EXPRESSION_END = '{"name": "calculator", "arguments": {"expression": "', '"}}'
MARKS = [CALL, CALL_END]
# A call is 14 tokens, the end of its turn included: a tiny model learns it in seconds.
PIECES = [EXPRESSION, EXPRESSION_END, "tools: ", "calculator", "system", "user", "assistant", "tool"]
CHARACTERS = sorted(string.digits + string.ascii_letters + string.punctuation + " \n")
# As in large models, more than the tokenizer has; divisible by 16 even when two ranks share it.
VOCAB_SIZE = 128
CONTEXT = 256
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def write_tokenizer(directory):
    """Write tokenizer.json and tokenizer_config.json, which has the chat template in it, into ``directory``."""
    names = [*SPECIAL, *MARKS, *PIECES, *CHARACTERS]
    # Every piece costs the same, so a text becomes as few as it can.
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=names.index(UNKNOWN)))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    _write(directory / "tokenizer.json", json.loads((directory / "tokenizer.json").read_text()), indent=None)
    path = directory / "tokenizer_config.json"
    # The class's name and the template's place are those that every release of transformers knows.
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(path, {**config, "chat_template": TEMPLATE.read_text()}, sort_keys=True)


def _write(path, value, *, indent=2, sort_keys=False):
    path.write_text(json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def check_tokenizer(directory, conversations):
    """Assert that texts come back, and that the template writes each of the (messages, tools, text) as it is here."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == len(SPECIAL) + len(MARKS) + len(PIECES) + len(CHARACTERS) <= VOCAB_SIZE
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    for messages, tools, text in conversations:
        rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert rendered == text, (rendered, text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
