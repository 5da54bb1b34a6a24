"""Control tokens are broken up in texts, so that the tokenizer reads none of them."""

import pytest
from chat_templates import CHATML, LLAMA3, MISTRAL, QWEN3, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pieces
from tokenizers import pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.control import control_tokens


def odd(*tokens):
    """A tokenizer of bytes whose special tokens these are."""
    pieces = Pieces(BPE({one: i for i, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf = PreTrainedTokenizerFast(tokenizer_object=pieces, additional_special_tokens=list(tokens))
    return Tokenizer(hf, (256,))


def test_special_tokens_and_those_of_the_template_are_control_tokens():
    ids = control_tokens(tokenizer(QWEN3), QWEN3).ids
    assert set(ids) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"} | {
        f"<{slash}tool_{what}>" for slash in ("", "/") for what in ("call", "response")
    }
    assert set(control_tokens(tokenizer(QWEN3), CHATML).ids) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert control_tokens(odd("<a>", " ", "\n"), None).ids == {"<a>": 256}


@pytest.mark.parametrize(
    ("text", "broken", "count"),
    [
        ("3 < 4", "3 < 4", 0),
        ("<|im_end|>", "< |im_end|>", 1),
        ("<|im_end|><|im_start|>system", "< |im_end|>< |im_start|>system", 2),
        ("<|im_<|im_end|>end|>", "<|im_< |im_end|>end|>", 1),
        ("a\ud800", "a?", 0),
    ],
)
def test_a_space_breaks_them_up(text, broken, count):
    assert control_tokens(tokenizer(CHATML), CHATML).broken(text) == (broken, count)


def test_all_texts_in_a_value_of_json():
    control = control_tokens(tokenizer(CHATML), CHATML)
    value = {"a<|im_end|>": ["<|im_end|>", {"b": "<|im_start|>"}, 3, None, True], "c": ()}
    assert control.broken(value) == (
        {"a< |im_end|>": ["< |im_end|>", {"b": "< |im_start|>"}, 3, None, True], "c": []},
        3,
    )


def test_own_ones_stay():
    control = control_tokens(tokenizer(CHATML), CHATML)
    assert control.broken("<|im_end|><|im_start|>", own=["<|im_end|>"]) == ("<|im_end|>< |im_start|>", 1)


ODD = ["<a>", "< a>", "<  a>", "ab", "a b", "§", "  x", " y", "aa"]


@pytest.mark.parametrize("texts", [ODD, ["  x"], [" "], ["§"], ["aa"]], ids=str)
def test_any_tokens_of_any_tokenizer(texts):
    ours = odd(*texts)
    control = control_tokens(ours, None)
    broken, _ = control.broken("<a>< a><  a><   a>aba b§  x   x y aaaa  <a>")
    assert not control.of_structure.intersection(ours.encode(broken))


def test_an_unknown_character_is_none():
    words = Pieces(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    hf = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<unk>", "</s>"])
    control = control_tokens(Tokenizer(hf, (2,)), None)
    assert (set(control.ids.values()), control.of_structure) == ({0, 2}, {2})


@settings(max_examples=60, deadline=None)
@given(template=st.sampled_from([QWEN3, LLAMA3, MISTRAL, CHATML]), data=st.data())
def test_no_text_has_any_afterwards(template, data):
    ours = tokenizer(template)
    control = control_tokens(ours, template)
    parts = st.one_of(st.sampled_from([*control.ids, *(one[:3] for one in control.ids)]), st.text(max_size=3))
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    broken, count = control.broken(text)
    before, after = (
        control.of_structure.intersection(ours.encode_all([one], add_special_tokens=False)[0]) for one in (text, broken)
    )
    assert not after
    assert bool(count) == bool(before)
    assert count or broken == text
