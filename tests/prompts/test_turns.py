"""The student's turn where an answer is known: templates with the structure of Qwen 3's, DeepSeek R1's and Llama's."""

import re

import pytest
import test_chat

from megatron_opd.prompts.chat import Encoder, checked

QWEN3 = (
    """\
{%- for message in messages -%}
{%- set reasoning = message.reasoning_content or '' -%}
{%- set content = message.content -%}
{%- if not reasoning and message.role == 'assistant' and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last -%}
<think>
{{ reasoning.strip('\\n') }}
</think>

{% endif -%}
{{ content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ (call.function or call) | tojson }}</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
"""
    + test_chat.ASSISTANT_BEGINS
)
R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% else %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>OPEN' }}{% endif %}"
)
OPENS, PLAIN = R1.replace("OPEN", "<think>\\n"), R1.replace("OPEN", "")
LLAMA = (
    "{% for m in messages %}{{ '<|h|>' + m.role + '<|/h|>\\n\\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}"
)
END, EOT = "<|end_of_sentence|>", "<|eot|>"


def turn(template, content, asked="why?", options=None, **fields):
    encoder = Encoder(test_chat.tokenizer(template), template, options=options or {})
    (reply,) = checked([{"role": "assistant", "content": content, **fields}])
    return encoder.turn(asked, encoder.render(asked), reply)


@pytest.mark.parametrize("template", [OPENS, PLAIN, LLAMA])
@pytest.mark.parametrize(
    "content",
    [
        "d",
        "e",
        "|",
        ">",
        "<|",
        "end",
        "sentence",
        "o",
        "t",
        "eot",
        "_of_",
        "Assistant",
        "User",
        "s",
        "X",
        "Y",
        "XY",
        "why?",
    ],
)
def test_an_answer_that_is_part_of_the_markers(template, content):
    assert turn(template, content) == content + (EOT if template == LLAMA else END)


@pytest.mark.parametrize("content", ["m", "im_end", "think", "assistant", "\n", "|>"])
def test_an_answer_that_is_part_of_the_markers_where_thinking_is_off(content):
    said = turn(test_chat.QWEN3_LIKE, content, options={"enable_thinking": False})
    assert said == content + "<|im_end|>\n"


@pytest.mark.parametrize("template", [OPENS, PLAIN])
def test_every_single_character(template):
    assert [turn(template, char) for char in map(chr, range(33, 127))] == [chr(i) + END for i in range(33, 127)]


# Thoughts.


@pytest.mark.parametrize(
    "said",
    [
        {"content": "7", "reasoning_content": "three and four"},
        {"content": "<think>\nthree and four\n</think>\n\n7"},
        {"content": "<think>three and four</think>7"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (QWEN3, {}, "<think>\nthree and four\n</think>\n\n7<|im_end|>\n"),
        (QWEN3, {"enable_thinking": True}, "<think>\nthree and four\n</think>\n\n7<|im_end|>\n"),
        (QWEN3, {"enable_thinking": False}, "7<|im_end|>\n"),
        (OPENS, {}, f"three and four\n</think>\n\n7{END}"),
    ],
    ids=["Qwen 3", "thinking", "not thinking", "opened"],
)
def test_a_thought_is_part_of_the_turn(said, template, options, expected):
    assert turn(template, options=options, **said) == expected


@pytest.mark.parametrize("template", [PLAIN, LLAMA])
def test_a_thought_in_the_content_stays_where_the_template_opens_none(template):
    content = "<think>\nhm\n</think>\n\n8"
    assert turn(template, content) == content + (EOT if template == LLAMA else END)


@pytest.mark.parametrize("template", [PLAIN, LLAMA])
def test_a_thought_that_the_template_would_drop_is_refused(template):
    with pytest.raises(
        ValueError, match=r"does not show the assistant's reasoning_content, so the student would learn"
    ):
        turn(template, "8", reasoning_content="hm")


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_an_empty_thought_is_none(nothing):
    assert turn(LLAMA, "8", reasoning_content=nothing) == f"8{EOT}"
    assert turn(OPENS, "8", reasoning_content=nothing) == f"8{END}"


# Calls of tools.

CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "ox"}}}]


@pytest.mark.parametrize("content", ["", None, "Let me see."])
def test_calls_are_part_of_the_turn(content):
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "ox"}}</tool_call>'
    expected = f"<think>\n\n</think>\n\n{content or ''}{call}<|im_end|>\n"
    assert turn(QWEN3, content, tool_calls=CALLS) == expected
    assert turn(QWEN3, content, tool_calls=[CALLS[0]["function"]]) == expected


@pytest.mark.parametrize("template", [PLAIN, OPENS, LLAMA])
def test_calls_that_the_template_would_drop_are_refused(template):
    with pytest.raises(ValueError, match=re.escape("does not show the assistant's tool_calls (look_up)")):
        turn(template, "Let me see.", tool_calls=CALLS)


# Templates that change what is said.


@pytest.mark.parametrize(
    "shown", ["{{ m.content | upper }}", "{{ m.content[:1] }}", "", "{{ m.content }}{{ m.content }}"], ids=str
)
@pytest.mark.parametrize("opened", ["", "\n"])
def test_an_answer_that_the_template_changes_is_refused(shown, opened):
    asked = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}A:" + shown + "{% endif %}"
    template = asked + "{% endfor %}{{ 'A:" + opened + "' if add_generation_prompt else '' }}"
    if shown.count("content") == 2 and not opened:
        assert turn(template, "no") == "nono"  # all of it is there, and it is the template's own turn
        return
    with pytest.raises(ValueError, match="the chat template changes the answer"):
        turn(template, "no")
