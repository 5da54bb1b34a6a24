"""Conversations that go on: the tokens behind a turn are those of the whole conversation, or a new prompt begins."""

import json
from dataclasses import replace

import pytest
from chat_templates import CALCULATOR, CHATML, CONTROL, LLAMA3, MISTRAL, QWEN3, R1, encoder, tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_opd.environments.environment import Turn
from megatron_opd.prompts.conversation import Conversation, message_of, reader_for, render_later

USER = {"role": "user", "content": "What is 12 * 34?"}
FORMS = {QWEN3: "hermes", LLAMA3: "llama3", MISTRAL: "mistral", CHATML: "hermes", R1: "hermes"}
NAMES = {QWEN3: "qwen3", LLAMA3: "llama3", MISTRAL: "mistral", CHATML: "chatml", R1: "r1"}


class Talk:
    """An episode in tokens, beside the messages that anybody else would give the template."""

    def __init__(self, ours, *messages):
        self.ours, self.messages = ours, [*messages]
        self.talk = Conversation(ours, self.messages)
        self.reader = reader_for(ours, FORMS[ours.template])
        self.ids = self.rendered()
        self.number = 0

    def rendered(self):
        text = self.ours.apply(self.messages, add_generation_prompt=True)
        return self.ours.tokenizer.encode_all([text], add_special_tokens=False)[0]

    def sampled(self, said, end=None):
        """The tokens of a turn as the tokenizer gives them where the turn stands."""
        hf, prompt = self.ours.tokenizer.hf, self.ours.apply(self.messages, add_generation_prompt=True)
        end = end or hf.convert_ids_to_tokens(self.ours.tokenizer.eos_id)
        whole, before = (hf(text, add_special_tokens=False)["input_ids"] for text in (prompt + said + end, prompt))
        assert whole[: len(before)] == before
        return whole[len(before) :]

    def say(self, said, *answers, end=None, ids=(), **message):
        """The continuation behind the turn `said`, which others know as `message`."""
        ids = list(ids) or self.sampled(said, end)
        content, calls = self.reader.read(said, self.number)
        self.turn = Turn(number=self.number, text=said, content=content, calls=calls, token_ids=tuple(ids))
        answers = [
            {**one, **({"tool_call_id": calls[0].id} if one["role"] == "tool" and calls else {})} for one in answers
        ]
        more = self.talk.continued(message_of(self.turn), ids, answers)
        self.ids = list(more.ids) if more.is_rewritten else [*self.ids, *ids, *more.ids]
        message = {"content": said, **message}
        named = [{**one, "id": its.id} for one, its in zip(message.get("tool_calls", ()), calls, strict=False)]
        message |= {"tool_calls": named} if named else {}
        self.messages += [{"role": "assistant", **message}, *answers]
        self.number += 1
        return more


def call(expression):
    """A call of the calculator, for a template."""
    return [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}]


def hermes(expression, before="", arguments="arguments"):
    said = json.dumps({"name": "calculator", arguments: {"expression": expression}})
    return f"{before}<tool_call>\n{said}\n</tool_call>"


def llama3(expression):
    return json.dumps({"name": "calculator", "parameters": {"expression": expression}}, ensure_ascii=False)


def tool(content):
    return {"role": "tool", "name": "calculator", "content": content}


def user(content):
    return {"role": "user", "content": content}


# The tokens of the whole conversation.


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("is_of_words", [False, True])
def test_qwen3_goes_on_behind_tools(options, is_of_words):
    talk = Talk(encoder(QWEN3, is_of_words=is_of_words, **options), {"role": "system", "content": "Be brief."}, USER)
    thought = {} if options.get("enable_thinking") is False else {"reasoning_content": "I compute."}
    think = "<think>\nI compute.\n</think>\n\n" if thought else ""
    empty = {"reasoning_content": "\n"} if not thought else {}
    more = talk.say(think + hermes("12*34"), tool("408"), content="", tool_calls=call("12*34"), **thought, **empty)
    assert not more.is_rewritten
    said = hermes("408 + 1", before=f"{think}Let me see.\n")
    talk.say(said, tool("409"), content="Let me see.", tool_calls=call("408 + 1"), **thought, **empty)
    assert talk.ids == talk.rendered()


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, CHATML], ids=NAMES.get)
@pytest.mark.parametrize("is_of_words", [False, True])
def test_plain_turns_go_on_behind_users(template, is_of_words):
    talk = Talk(encoder(template, is_of_words=is_of_words), USER)
    for said in ("It is 408.", "Yes:\n\n  12 * 34\n= 408 é", "é"):
        assert not talk.say(said, user("Are you sure? ")).is_rewritten
    assert talk.ids == talk.rendered()


@pytest.mark.parametrize("is_of_words", [False, True])
def test_llama3_goes_on_behind_tools(is_of_words):
    talk = Talk(encoder(LLAMA3, is_of_words=is_of_words), USER)
    for expression, said in (("12*34", "408"), ('"é"', "<b>&'é'\n")):
        assert not talk.say(llama3(expression), tool(said), content="", tool_calls=call(expression)).is_rewritten
    assert talk.ids == talk.rendered()


@pytest.mark.parametrize("is_of_words", [False, True])
def test_mistral_goes_on_behind_tools(is_of_words):
    talk = Talk(encoder(MISTRAL, is_of_words=is_of_words), USER)
    for expression in ("12*34", "408 + 1"):
        id = f"call{talk.number:05}"
        said = {"name": "calculator", "arguments": {"expression": expression}, "id": id}
        more = talk.say(f"[TOOL_CALLS] {json.dumps([said])}", tool("408"), content="", tool_calls=call(expression))
        assert (more.is_rewritten, more.text.count(id)) == (False, 1)
    assert talk.ids == talk.rendered()


def test_mistral_moves_its_tools_to_a_users_next_message():
    talk = Talk(encoder(MISTRAL), USER)
    assert talk.say(" It is 408.", user("Are you sure?")).is_rewritten
    assert talk.ids == talk.rendered()
    without = Talk(encoder(MISTRAL, tools=()), USER)
    assert not without.say(" It is 408.", user("Are you sure?")).is_rewritten
    assert without.ids == without.rendered()


def test_several_calls_have_an_answer_each():
    talk = Talk(encoder(QWEN3), USER)
    said = hermes("1+1") + "\n" + hermes("2+2")
    more = talk.say(said, tool("2"), tool("4"), content="", tool_calls=[*call("1+1"), *call("2+2")])
    assert more.text == (
        "\n<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert talk.ids == talk.rendered()


CONTENT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    template=st.sampled_from([QWEN3, LLAMA3, CHATML]),
    is_of_words=st.booleans(),
    turns=st.lists(st.tuples(CONTENT.map(str.strip), CONTENT), min_size=1, max_size=3),
)
def test_any_words_go_on_as_the_whole_is_tokenized(template, is_of_words, turns):
    talk = Talk(encoder(template, is_of_words=is_of_words), USER)
    for said, answer in turns:
        try:
            ids = talk.sampled(said)
        except AssertionError:  # its first characters join the prompt's last token, so nobody can sample it
            assume(False)
        more = talk.say(said, user(answer), ids=ids)
        assert (more.is_rewritten, more.forged) == (False, 0)
    assert talk.ids == talk.rendered()


# Sampled tokens stay as they are.


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, CHATML], ids=NAMES.get)
def test_what_follows_does_not_depend_on_the_tokens_of_the_turn(template):
    ours = encoder(template)
    hf, tokens = ours.tokenizer.hf, []
    for ids in (hf.convert_tokens_to_ids(["t", "h", "e"]), hf("the", add_special_tokens=False)["input_ids"]):
        more = Talk(ours, USER).say("the", user("Really?"), ids=[*ids, ours.tokenizer.eos_id])
        assert not more.is_rewritten
        tokens.append(more.ids)
    assert len(set(tokens)) == 1


@pytest.mark.parametrize(
    ("template", "end", "expected"),
    [
        (QWEN3, "<|im_end|>", "\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN3, "<|endoftext|>", "<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n"),
        (
            LLAMA3,
            "<|eom_id|>",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nReally?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_the_templates_own_end_follows_where_the_policy_said_another(template, end, expected):
    ours = encoder(template)
    more = Talk(ours, USER).say("408", user("Really?"), end=end)
    assert more.text == expected == ours.tokenizer.hf.decode(more.ids)


def test_a_turn_without_an_end_gets_the_templates():
    ours = encoder(QWEN3)
    more = Talk(ours, USER).say(
        "408", user("Really?"), ids=ours.tokenizer.hf("408", add_special_tokens=False)["input_ids"]
    )
    assert more.text == "<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "written", ['{"arguments":{"expression":"1+1"},"name":"calculator"}', hermes("1+1")[12:-12] + " "]
)
def test_a_call_that_the_template_writes_otherwise_is_no_rewriting(written):
    talk = Talk(encoder(QWEN3), USER)
    said = f"<tool_call>{written}</tool_call>"
    more = talk.say(said, tool("2"), content="", tool_calls=call("1+1"))
    assert not more.is_rewritten
    assert talk.ours.tokenizer.hf.decode(talk.ids).count(said) == 1


@pytest.mark.parametrize("template", [QWEN3, LLAMA3, MISTRAL], ids=NAMES.get)
def test_a_call_that_cannot_be_read_stays_as_it_was_said(template):
    said = {QWEN3: "<tool_call>{1+1}</tool_call>", LLAMA3: '{"name": 1+1}', MISTRAL: " [TOOL_CALLS] 1+1"}[template]
    talk = Talk(encoder(template), USER)
    more = talk.say(said, tool("Error: it is not valid JSON"))
    assert not more.is_rewritten
    assert "not valid JSON" in more.text
    assert talk.turn.calls[0].problem


def test_calls_that_the_template_refuses_as_such_are_text():
    talk = Talk(encoder(LLAMA3), USER)
    said = f"{llama3('1+1')}; {llama3('2+2')}"  # the template takes one call a turn
    assert not talk.say(said, tool("2"), tool("4")).is_rewritten
    assert talk.talk.messages[1] == {"role": "assistant", "content": said}
    assert talk.ids == talk.rendered()


def test_answers_to_unreadable_calls_get_made_up_ones_where_the_template_refuses_them_alone():
    talk = Talk(encoder(MISTRAL), USER)
    said = " [TOOL_CALLS] 1+1"
    assert not talk.say(said, tool("Error")).is_rewritten
    assert talk.say(said, tool("Error")).is_rewritten  # two plain turns after each other are refused
    assert talk.talk.messages[3]["tool_calls"][0]["id"] == talk.turn.calls[0].id


# Templates that rewrite what was before.


def test_qwen3_takes_thoughts_out_behind_a_users_message():
    talk = Talk(encoder(QWEN3), USER)
    think = {"reasoning_content": "I compute."}
    said = hermes("1+1", before="<think>\nI compute.\n</think>\n\n")
    assert not talk.say(said, tool("2"), content="", tool_calls=call("1+1"), **think).is_rewritten
    more = talk.say("<think>\nSo.\n</think>\n\nIt is 2.", user("Sure?"), content="It is 2.", reasoning_content="So.")
    assert more.is_rewritten
    assert "<think>" not in more.text
    assert talk.ids == talk.rendered() == talk.ours.encode([more.text])[0]
    again = talk.say("<think>\nOh.\n</think>\n\n" + hermes("2"), tool("2"), content="", tool_calls=call("2"))
    assert not again.is_rewritten  # from here on it goes on as before


def test_qwen3_without_thinking_takes_the_empty_thought_out_behind_a_users_message():
    talk = Talk(encoder(QWEN3, enable_thinking=False), USER)
    assert talk.say("It is 2.", user("Sure?")).is_rewritten
    assert talk.ids == talk.rendered()


def test_an_empty_thought_stays_behind_tools():
    talk = Talk(encoder(QWEN3), USER)
    said = hermes("1+1", before="<think>\n\n</think>\n\n")
    more = talk.say(said, tool("2"), content="", tool_calls=call("1+1"), reasoning_content="\n")
    assert not more.is_rewritten
    assert talk.ids == talk.rendered()


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=NAMES.get)
def test_templates_that_show_thoughts_go_on(template):
    talk = Talk(encoder(template, tools=()), USER)
    for _ in range(2):
        assert not talk.say("<think>\nHm.\n</think>\n\nIt is 2.", user("Sure?")).is_rewritten
    assert talk.ids == talk.rendered()


@pytest.mark.parametrize("said", ["Hm.\n</think>\n\nIt is 2.", "Hm, and then it ended"])
def test_a_template_that_opens_thoughts_and_takes_them_out_begins_anew(said):
    talk = Talk(encoder(R1, tools=()), USER)
    assert talk.say(said, user("Sure?"), content=said.split("</think>")[-1]).is_rewritten == ("</think>" in said)
    assert talk.ids == talk.rendered() or "</think>" not in said


def test_a_template_that_opens_thoughts_and_keeps_them_goes_on():
    keeps = R1.replace(".split('</think>')[-1]", "")
    CONTROL[keeps], FORMS[keeps] = CONTROL[R1], "hermes"
    talk = Talk(encoder(keeps, tools=()), USER)
    said = "Hm.\n</think>\n\nIt is 2."
    assert not talk.say(said, user("Sure?"), content=f"<think>\n{said}").is_rewritten
    assert talk.ids == talk.rendered()


def test_another_date_is_no_rewriting(monkeypatch):
    dated = "{{ now.day }}" + CHATML
    CONTROL[dated], FORMS[dated] = CONTROL[CHATML], "hermes"
    options = {"now": {"day": "Monday"}}
    talk = Talk(encoder(dated, tools=(), **options), USER)
    talk.ours.options["now"]["day"] = "Tuesday"
    assert not talk.say("It is 2.", user("Sure?")).is_rewritten
