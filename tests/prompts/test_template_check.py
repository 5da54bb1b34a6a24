"""Templates with which tools cannot work are refused by name, before a run."""

import re

import pytest
from chat_templates import CALCULATOR, CHATML, CONTROL, LLAMA3, MISTRAL, QWEN3, R1, encoder
from test_conversation import FORMS, NAMES, USER, Talk, hermes, tool

from megatron_opd.prompts.conversation import check_template

ASKS = "{{ tools[0].function.name if tools }}"
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
BEGINS = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
WHOLE = ASKS + EACH.replace("{{ CONTENT }}", CALLS) + BEGINS


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, MISTRAL, WHOLE], ids=[*list(NAMES.values())[:3], "own"])
@pytest.mark.parametrize("tools", [(), (CALCULATOR,)], ids=["users", "tools"])
def test_templates_made_for_tools_are_taken(template, tools):
    CONTROL.setdefault(template, CONTROL[CHATML])
    check_template(encoder(template, tools=tools), "auto")


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, "hermes"), ({}, "python"), ({"enable_thinking": False}, "auto")], ids=str
)
def test_forms_and_options(options, wanted):
    check_template(encoder(QWEN3, **options), wanted)


@pytest.mark.parametrize(
    ("template", "wanted", "wrong"),
    [
        (CHATML, "hermes", "data.chat_template: the template does not show tools (calculator); give it a file with a"),
        (R1, "hermes", "data.chat_template: the template does not show tools (calculator)"),
        (CHATML, "auto", "environment.calls: auto cannot tell how the policy calls tools here; name the form: hermes,"),
        (
            CHATML,
            "auto",
            "mistral or python; and data.chat_template: the template does not show tools; give it",
        ),
        (CHATML, "hermse", "environment.calls: there is no form 'hermse'"),
        (
            WHOLE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
            "auto",
            "data.chat_template: the template does not show messages of role tool",
        ),
        (
            "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}" + WHOLE,
            "auto",
            "data.chat_template: the template cannot go on with a message of role tool: the chat template refuses",
        ),
        (
            WHOLE.replace(CALLS, "{{ m.content if m.role != 'assistant' }}"),
            "hermes",
            "data.chat_template: the template does not show the assistant's tool_calls",
        ),
        (
            WHOLE.replace("{{ m.role }}", "{{ m.role }}{{ messages | length }}"),
            "auto",
            "data.chat_template: the template rewrites every turn, also one without a thought, so that no trajectory",
        ),
        (
            WHOLE.replace("c.function | tojson", "c.function.name ~ c.function.arguments"),
            "auto",
            "environment.calls: auto reads calls in the form hermes, in which the template does not write them",
        ),
    ],
)
def test_templates_that_cannot_work_are_refused(template, wanted, wrong):
    CONTROL.setdefault(template, CONTROL[CHATML])
    with pytest.raises(ValueError, match=re.escape(wrong)):
        check_template(encoder(template), wanted)


def test_a_template_that_shows_no_calls_as_such_shows_them_as_text():
    template = WHOLE.replace(CALLS, "{{ m.content }}")
    CONTROL[template], FORMS[template] = CONTROL[CHATML], "hermes"
    check_template(encoder(template), "hermes")
    talk = Talk(encoder(template), USER)
    assert not talk.say(hermes("1+1"), tool("2")).is_rewritten
    assert talk.ids == talk.rendered()
