"""Conversations that go on: the tokens behind a turn are those of the whole conversation, or a new prompt begins."""

import json
from dataclasses import replace

import pytest
from chat_templates import CALCULATOR, CHATML, LLAMA3, MISTRAL, QWEN3, R1, encoder

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
        message |= {"tool_calls": [{**message["tool_calls"][0], "id": calls[0].id}]} if "tool_calls" in message else {}
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
    return json.dumps({"name": "calculator", "parameters": {"expression": expression}})


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
