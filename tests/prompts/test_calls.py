"""Calls in a turn's text: what each form finds, what is wrong with the others, and that no text raises anything."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pieces
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.calls import NOTHING, OWN, reader_of

FORMS = ("hermes", "llama3", "mistral", "python")
ADD = {"name": "add", "arguments": {"a": 1, "b": [2, {"c": None}]}}
RESPONSE = {
    "start_anchor": "<a>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<<",
            "close": ">>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}


def tokenizer(**more):
    hf = PreTrainedTokenizerFast(tokenizer_object=Pieces(WordLevel({"</s>": 0}, unk_token="</s>")), eos_token="</s>")
    for name, value in more.items():
        setattr(hf, name, value)
    return Tokenizer(hf, (0,))


def read(form, text, **more):
    """(content, the calls as (name, arguments) or the problem)."""
    content, calls = reader_of(tokenizer(), None, form, **more).read(text)
    return content, [call.problem or (call.name, call.arguments) for call in calls]


def hermes(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


ADDS = ("add", ADD["arguments"])
LLAMA = json.dumps({"name": "add", "parameters": ADD["arguments"]})


@pytest.mark.parametrize(
    ("form", "text", "content", "number"),
    [
        ("hermes", hermes(ADD), "", 1),
        ("hermes", f"Let me see.\n{hermes(ADD, ADD)}\nNow.", "Let me see.\nNow.", 2),
        ("hermes", "<tool_call>" + json.dumps(ADD), "", 1),  # the turn ended before it was closed
        ("hermes", f"<think>\n{hermes(ADD)}\n</think>\n\n{hermes(ADD)}", f"<think>\n{hermes(ADD)}\n</think>", 1),
        ("hermes", f"<think>a</think>{hermes(ADD)}<think>{hermes(ADD)}", f"<think>a</think>\n<think>{hermes(ADD)}", 1),
        ("llama3", LLAMA, "", 1),
        ("llama3", f"  {json.dumps(ADD)}", "", 1),
        ("llama3", f"{LLAMA}; {LLAMA}\n{LLAMA}", "", 3),
        ("llama3", f"<|python_tag|>{LLAMA}", "", 1),
        ("llama3", f"<think>\n{LLAMA}</think>\n{LLAMA}", f"<think>\n{LLAMA}</think>", 1),
        ("mistral", f"[TOOL_CALLS] [{json.dumps(ADD)}, {json.dumps(ADD)}]", "", 2),
        ("mistral", f"So:[TOOL_CALLS][{json.dumps(ADD)}]", "So:", 1),
        ("mistral", f"[TOOL_CALLS]{json.dumps(ADD)}", "", 1),
    ],
)
def test_calls_are_found(form, text, content, number):
    assert read(form, text) == (content, [ADDS] * number)


@pytest.mark.parametrize(
    ("text", "content", "codes"),
    [
        ("<|python_tag|>1 + 1", "", ["1 + 1"]),
        (
            "I run\n```python\nx = '''\n  <think>'''\n```\nand\n```py\ny\n```",
            "I run\nand",
            ["x = '''\n  <think>'''", "y"],
        ),
        ("```python\nprint('no end')", "", ["print('no end')"]),
        ("```json\n{}\n```", "```json\n{}\n```", []),
        ("an inline ```python\n1\n```", "an inline ```python\n1\n```", []),
        ("<think>\n```python\n1\n```\n</think>4", "<think>\n```python\n1\n```\n</think>4", []),
    ],
)
def test_code_is_a_call_of_python(text, content, codes):
    assert read("python", text) == (content, [("python", {"code": code}) for code in codes])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "408",
        '{"answer": 5}',
        '{"name": "Ann"}',
        "a {b} c",
        "tool_call",
        "TOOL_CALLS",
        f"It says {LLAMA}",
        "```\n1\n```",
    ],
)
def test_plain_answers_are_no_calls(form, text):
    assert read(form, text) == (text, [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [hermes(ADD), LLAMA, f"[TOOL_CALLS][{LLAMA}]", "```python\n1\n```"])
def test_a_thought_that_the_prompt_opens_has_no_calls(form, text):
    prompt = "<|im_start|>assistant\n<think>\n"
    assert read(form, text, prompt=prompt) == (text, [])
    content, calls = read(form, f"Hm {text}</think>\n{text}", prompt=prompt)
    assert content.startswith(f"Hm {text}</think>")
    assert calls == read(form, text)[1]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("", "it is not valid JSON (Expecting value at character 1)"),
        ("[1,", "it is not valid JSON (Expecting value at character 4)"),
        ("add(1, 2)", "it is not valid JSON (Expecting value at character 1)"),
        ("{'name': 'add'}", "it is not valid JSON (Expecting property name enclosed in double quotes at character 2)"),
        ("7", 'the call must be a JSON object with "name" and "arguments"'),
        ('"add"', 'the call must be a JSON object with "name" and "arguments"'),
        ("[]", 'the call must be a JSON object with "name" and "arguments"'),
        ("{}", 'the call has no "name"'),
        ('{"name": 3, "arguments": {}}', 'the call has no "name"'),
        ('{"name": " ", "arguments": {}}', 'the call has no "name"'),
        ('{"name": "add", "arguments": "1"}', "the \"arguments\" of 'add' are no JSON object"),
        ('{"name": "add", "arguments": null}', "the \"arguments\" of 'add' are no JSON object"),
        ('{"name": "add", "arguments": {"a": NaN}}', "it is not valid JSON (NaN is no number of JSON)"),
        ('{"name": "add", "arguments": {"a": -Infinity}}', "it is not valid JSON (-Infinity is no number of JSON)"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "it is not valid JSON (the number 1e999 is too large)"),
        (r'{"name": "add", "arguments": {"a": "\ud800"}}', "it is not valid JSON (half of a surrogate pair)"),
        ('{"name": "add", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}", "it is nested more than 32 times"),
        ('{"name": "add", "arguments": ' + "[" * 100_000, "it is not valid JSON (nested too deeply)"),
        ('{"name": "add"} {"name": "add"}', "something follows its JSON object"),
    ],
)
def test_what_is_wrong_is_said(said, problem):
    assert read("hermes", f"a <tool_call>{said}</tool_call> b {hermes(ADD)}") == ("a\nb", [problem, ADDS])


def test_a_number_with_thousands_of_digits_is_a_problem():
    (problem,) = read("hermes", '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>")[1]
    assert problem.startswith("it is not valid JSON (Exceeds the limit")


@pytest.mark.parametrize(
    ("form", "text", "problems"),
    [
        ("llama3", '{"name": "add", "parameters": {', 1),
        ("llama3", f"{LLAMA}; " + '{"name": "add", "parameters": 3}', 1),
        ("llama3", "<|python_tag|>add(1, 2)", 1),
        ("llama3", "<|python_tag|>{}", 1),
        ("mistral", "[TOOL_CALLS]", 1),
        ("mistral", "[TOOL_CALLS] []", 1),
        ("mistral", f"[TOOL_CALLS] nothing [TOOL_CALLS] [{LLAMA}, 3]", 2),
        ("python", "<|python_tag|> ", 1),
        ("python", "```python\n\n```", 1),
    ],
)
def test_bad_calls_of_other_forms(form, text, problems):
    _, calls = reader_of(tokenizer(), None, form).read(text)
    assert sum(bool(call.problem) for call in calls) == problems
    assert all(call.name == "" and not call.arguments for call in calls if call.problem)
    assert all((call.name, call.arguments) == ADDS for call in calls if not call.problem)


def test_a_call_that_is_neither_right_nor_closed_leaves_the_next_one():
    assert read("hermes", f"<tool_call>oops\n{hermes(ADD)}")[1] == [
        "it is not valid JSON (Expecting value at character 1)",
        ADDS,
    ]


def test_an_end_mark_within_an_argument_does_not_end_the_call():
    call = {"name": "add", "arguments": {"code": "print('</tool_call><think>')"}}
    assert read("hermes", hermes(call, ADD)) == ("", [("add", call["arguments"]), ADDS])


def test_arguments_may_be_missing():
    assert read("hermes", '<tool_call>{"name": "add"}</tool_call>') == ("", [("add", {})])


# Ids.


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_nine_letters_and_digits_and_the_same_every_time(form):
    reader = reader_of(tokenizer(), None, form)
    text = {"hermes": hermes(ADD, ADD), "llama3": f"{LLAMA};{LLAMA}", "mistral": f"[TOOL_CALLS][{LLAMA},{LLAMA}]"}.get(
        form, "```python\n1\n```\n```python\n1\n```"
    )
    ids = [call.id for number in (0, 1) for call in reader.read(text, number)[1]]
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", one) for one in ids)
    assert ids[:2] == [call.id for call in reader.read(text)[1]]


@pytest.mark.parametrize(
    ("form", "one"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call> \u2003\n{}"),
        ("mistral", '[TOOL_CALLS] [{"id": "sameSame1"}]'),
    ],
)
def test_a_policy_that_repeats_itself(form, one):
    content, calls = reader_of(tokenizer(), None, form).read(one * 3000)
    assert content == ""
    assert len({call.id for call in calls}) == len(calls) == 3000
    assert all(call.problem for call in calls)


def test_ids_of_the_policy_are_kept_where_they_can_be():
    given = [{**ADD, "id": one} for one in ("abcDEF123", "abcDEF123", "short", 9)]
    ids = [call.id for call in reader_of(tokenizer(), None, "mistral").read(f"[TOOL_CALLS]{json.dumps(given)}")[1]]
    assert ids[0] == "abcDEF123"
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", one) for one in ids)


# Which form it is.


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("…<tool_call>…", "hermes"),
        ("…[TOOL_CALLS]…", "mistral"),
        ('…"parameters"…', "llama3"),
        ("…<|python_tag|>…", "llama3"),
        ("…", NOTHING),
        (None, NOTHING),
    ],
)
def test_auto_is_the_form_that_the_template_shows(template, form):
    reader = reader_of(tokenizer(), template, "auto")
    assert (reader.form, reader.has_calls, reader.is_structured) == (form, form != NOTHING, form != NOTHING)
    assert reader_of(tokenizer(), template, "python").form == "python"


def test_an_unknown_form_is_refused():
    with pytest.raises(
        ValueError, match=r"environment.calls: there is no form 'hermse'; there are: auto, hermes, llama3"
    ):
        reader_of(tokenizer(), None, "hermse")


def test_auto_is_the_tokenizers_own_response_template_where_it_has_one():
    reader = reader_of(tokenizer(response_template=RESPONSE), "…<tool_call>…", "auto", prompt="<a>")
    assert (reader.form, reader.is_structured) == (OWN, True)
    content, calls = reader.read(f"<think>hm <<{json.dumps(ADD)}>></think>So: <<{json.dumps(ADD)}>><<3>>")
    assert content == f"<think>hm <<{json.dumps(ADD)}>></think>\n\nSo:"
    assert [call.problem or (call.name, call.arguments) for call in calls] == [
        ADDS,
        'the call must be a JSON object with "name" and "arguments"',
    ]
    assert reader.read("just 3") == ("just 3", ())


def test_what_the_own_response_template_cannot_read_is_read_in_the_form_that_the_template_shows():
    reader = reader_of(tokenizer(response_template=RESPONSE), "…<tool_call>…", "auto", prompt="<a>")
    content, calls = reader.read(f"<<no JSON>> {hermes(ADD)}")
    assert (content, [call.name for call in calls]) == ("<<no JSON>>", ["add"])


# Whatever a policy says.

PARTS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "```python\n",
    "```",
    ";",
]
TEXTS = st.lists(
    st.one_of(
        st.text(alphabet=st.characters(exclude_categories=()), max_size=8),
        st.sampled_from(
            [*PARTS, '{"name":', '"arguments":', '"parameters"', "\\ud800", "1e999", "NaN", "{", "}", "[", "]", ","]
        ),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["name", "arguments", "parameters", "id", "x"]), inner, max_size=3),
            ),
            max_leaves=6,
        ).map(json.dumps),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, form=st.sampled_from([*FORMS, "auto"]), prompt=st.sampled_from(["", "<think>\n"]))
def test_no_text_raises_anything(text, form, prompt):
    own = OWNED if form == "auto" else PLAIN
    content, calls = reader_of(own, "<tool_call>", form, prompt=prompt).read(text)
    assert isinstance(content, str)
    assert calls or content == text
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert re.fullmatch(r"[A-Za-z0-9]{9}", call.id)
        assert bool(call.problem) != bool(call.name.strip())
        said = json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False)
        assert form == "python" or said.encode()


OWNED, PLAIN = tokenizer(response_template=RESPONSE), tokenizer()
