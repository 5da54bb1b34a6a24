"""Thinking is never graded, whatever the reward: the answer is what follows it."""

from types import SimpleNamespace

import pytest

from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.thinking import after_thinking, markers_of, response_text


def asked(answer):
    return Prompt(source="s", index=0, text="?", token_ids=(), answer=answer)


def letters(vocabulary, special=(), template=None):
    """A tokenizer of a token a letter, but for the words of `vocabulary`, whose ids are above the letters'."""
    words = {word: 1000 + i for i, word in enumerate(vocabulary)}
    named = {i: word for word, i in words.items()}

    def decode(ids, **_):
        return "".join("" if named.get(i) in special else named.get(i) or chr(i) for i in ids)

    hf = SimpleNamespace(
        get_vocab=lambda: words, all_special_ids=[words[w] for w in special], decode=decode, chat_template=template
    )
    return Tokenizer(hf, (0,)), lambda text: [words.get(part) or ord(part) for part in text]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>maybe 9</think>7", "7"),
        ("maybe 9</think>\n7", "\n7"),
        ("<think>9", ""),
        ("7 <think> 9", ""),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think></think>", ""),
        ("I think 7", "I think 7"),
    ],
)
def test_the_answer_is_what_follows(text, answer):
    assert after_thinking(text) == answer


@pytest.mark.parametrize(("name", "right"), [("exact", "12"), ("gsm8k", "It is 12."), ("math", r"\boxed{12}")])
def test_no_reward_sees_it(name, right):
    said = [
        f"<think>#### 5 \\boxed{{5}}</think>{right}",
        f"<think>{right}",
        f"<think>{right}</think>5",
        f"5</think>{right}",
    ]
    assert build_reward(name).grade([(asked("12"), text) for text in said]) == [1, 0, 0, 1]
    assert build_reward(name).grade([(asked("<think>5</think>12"), right)]) == [1]


def test_markers_come_from_the_setting_the_tokenizer_or_the_template():
    assert markers_of(letters([])[0]) == ("<think>", "</think>")
    assert markers_of(letters(["[THINK]", "[/THINK]"])[0]) == ("[THINK]", "[/THINK]")
    assert markers_of(letters([], template="… '<thinking>' + x + '</thinking>'")[0]) == ("<thinking>", "</thinking>")
    assert markers_of(letters(["</think>"])[0], ["{", "}"]) == ("{", "}")


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize(
    ("before", "response", "answer"),
    [
        (["a", "<think>", "\n"], ["9", "</think>", "7"], "7"),
        (["a", "<think>", "\n"], ["9"], ""),
        (["<think>", "\n", "</think>", "\n"], ["7"], "7"),
        (["<think>", "i", "s"], ["7"], "7"),
        (["a"], ["<think>", "9", "</think>", "7"], "7"),
        (["a"], ["7"], "7"),
        ([], ["7"], "7"),
    ],
)
def test_a_prompt_may_open_it_and_markers_may_be_special_tokens(special, before, response, answer):
    tokenizer, ids = letters(["<think>", "</think>"], special)
    markers = "<think>", "</think>"
    assert after_thinking(response_text(tokenizer, ids(before), ids(response), markers), markers) == answer
