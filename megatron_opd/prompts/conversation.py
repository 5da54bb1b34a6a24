"""A conversation that goes on: what follows the policy's turn, as the chat template writes it.

Sampled tokens are never tokenized again. The text behind a turn is the template's own: the conversation with the
answers and the next generation prompt, less what it says up to the end of the turn. Where a template writes what was
before otherwise than the policy met it (thoughts that are taken out), a whole new prompt takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opd.core.environment import Call, Message, Turn
from megatron_opd.prompts.calls import CallReader, reader_of
from megatron_opd.prompts.chat import Encoder, checked
from megatron_opd.prompts.control import control_tokens

_OPEN, _CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{_OPEN}(?:\s*{_CLOSE})?\s*\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The tokens behind a turn of the policy, or a prompt that takes its place."""

    ids: tuple[int, ...]
    """The tokens behind the turn's; with `is_rewritten`, the whole prompt that begins another trajectory."""
    is_rewritten: bool
    """Whether the template writes what was before otherwise than the policy met it."""
    text: str
    """The text of `ids`."""
    forged: int = 0
    """Control tokens that the answers spelled, and that were broken up."""


def reader_for(encoder: Encoder, wanted: str) -> CallReader:
    """The reader of the form `wanted` (environment.calls) for turns behind the encoder's prompts."""
    prompt = "" if encoder.template is None else encoder.render("?")
    return reader_of(encoder.tokenizer, encoder.template, wanted, prompt=prompt, tools=encoder.tools)


def message_of(turn: Turn, *, is_structured: bool = True) -> Message:
    """The assistant's message that a turn is. Its calls are in `tool_calls` where all of them could be read, and with
    `is_structured` (CallReader.is_structured); otherwise they stay in its text."""
    if not turn.calls or not is_structured or any(call.problem for call in turn.calls):
        return {"role": "assistant", "content": turn.text}
    calls = [_call(call.id, call.name, call.arguments) for call in turn.calls]
    return {"role": "assistant", "content": turn.content, "tool_calls": calls}


def render_later(encoder: Encoder, messages: Sequence[Message], talk: Conversation) -> tuple[int, ...]:
    """The prompt of `messages` with what the conversation added to its own: for a teacher with messages of its own,
    where another trajectory begins. Raises ValueError where the template refuses them.

    Control tokens of its tokenizer alone are plain text in what was added, since the student could only spell them.
    """
    theirs = control_tokens(encoder.tokenizer, encoder.template)
    both = [*messages, *theirs.broken(talk.added, own=talk.control.ids)[0]]
    if encoder.template is None:
        return tuple(encoder.encode(["".join(str(message["content"]) for message in both)])[0])
    return tuple(encoder.encode([encoder.apply(both, add_generation_prompt=True)])[0])


class Conversation:
    """The conversation of one episode."""

    def __init__(self, encoder: Encoder, messages: Sequence[Message]) -> None:
        """`messages`: those of the prompt, the system's included (Prompt.messages)."""
        self.encoder = encoder
        self.messages: list[Message] = list(messages)
        self._first = len(self.messages)
        self.control = control_tokens(encoder.tokenizer, encoder.template)
        """The prompt of the student."""

    @property
    def added(self) -> list[Message]:
        """The messages behind the prompt's: the policy's and the answers."""
        return self.messages[self._first :]

    def continued(self, reply: Message, ids: Sequence[int], answers: Sequence[Message]) -> Continuation:
        """Add the policy's message and the answers to it; what follows the turn.

        `reply` is `message_of` the turn, `ids` its sampled tokens with its end. Raises ValueError, and adds nothing,
        where answers are malformed, or the template refuses them.
        """
        clean, forged = self._clean(answers)
        if self.encoder.template is None:
            self.messages += [reply, *clean]
            return self._behind_turn("".join(str(answer["content"]) for answer in clean), ids, forged)
        way, whole, tail = self._best(reply, ids, clean)
        self.messages += [way, *clean]
        if tail:
            return self._behind_turn(tail, ids, forged)
        return Continuation(ids=tuple(self.encoder.encode([whole])[0]), is_rewritten=True, text=whole, forged=forged)

    def _clean(self, answers: Sequence[Message]) -> tuple[list[Message], int]:
        """(the answers without control tokens, how many they had). Raises ValueError where that cannot be had."""
        clean, forged = self.control.broken(checked([dict(answer) for answer in answers]))
        _, joined = self.control.broken("".join(answer["content"] for answer in clean))
        if joined:  # a template may put one answer right behind another
            clean = [{**answer, "content": answer["content"] + " "} for answer in clean]
        for answer in clean:
            if self.control.of_structure.intersection(self._encoded(answer["content"])):
                raise ValueError("an answer spells a control token in a way that cannot be broken up")
        return clean, forged + joined

    def _best(self, reply: Message, ids: Sequence[int], answers: list[Message]) -> tuple[Message, str, str]:
        """(the policy's message as the template is given it, the whole text, what of it follows the turn; empty where
        the template rewrites what was before)."""
        start = self.encoder.apply(self.messages, add_generation_prompt=True)
        refusal, rewritten = None, None
        for way in self._ways(reply, ids, start, answers):
            try:
                whole = self.encoder.apply([*self.messages, way, *answers], add_generation_prompt=True)
            except ValueError as error:
                refusal = refusal or error
                continue
            tail = self._tail(way, answers, whole)
            if tail and whole.startswith(start) and _shows(whole[len(start) : len(whole) - len(tail)], way, start):
                return way, whole, tail
            rewritten = rewritten or (way, whole, "")
        if rewritten is None:
            raise refusal or ValueError("there is no way to write the turn")
        return rewritten

    def _ways(self, reply: Message, ids: Sequence[int], start: str, answers: list[Message]) -> Iterator[Message]:
        """The policy's message in all forms that a template may want, the plainest first: calls as such or as text,
        thoughts within the content or beside it."""
        tokenizer = self.encoder.tokenizer
        text = tokenizer.decode_all(ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids)
        sampled = set(ids)
        own = {_OPEN, _CLOSE, *(token for token, i in self.control.ids.items() if i in sampled)}
        opened = _opened(start)
        ways: list[dict[str, Any]] = [dict(reply)]
        if reply.get("tool_calls"):
            ways.append({"role": "assistant", "content": text})
        elif asked := [one for one in answers if one["role"] == "tool" and one.get("tool_call_id")]:
            # Some templates refuse answers without calls, and a call that could not be read stays text.
            calls = [_call(one["tool_call_id"], str(one.get("name") or "unknown"), {}) for one in asked]
            ways.append({**reply, "tool_calls": calls})
        for way in ways:
            content = opened + way["content"]
            variants = [{**way, "content": content}]
            if _CLOSE in content:
                thought, _, rest = content.partition(_CLOSE)
                thought = thought.strip().removeprefix(_OPEN).strip() or "\n"  # which templates show as an empty one
                variants.append({**way, "content": rest.lstrip("\n"), "reasoning_content": thought})
            for variant in variants:
                yield self.control.broken(variant, own=own)[0]

    def _tail(self, way: Message, answers: list[Message], whole: str) -> str:
        """The part of the `whole` text behind the turn, by where the template puts a made-up one; empty if unknown."""
        mark = next(mark for i in range(len(whole) + 1) if (mark := f"X{i}X") not in whole)
        plain = self._behind(mark, {"role": "assistant", "content": mark}, answers)
        if plain and whole.endswith(plain):
            return plain
        if not way.get("tool_calls"):
            return ""
        calls = [_call(call["id"], call["function"]["name"], {"it": mark}) for call in way["tool_calls"]]
        behind = self._behind(mark, {**way, "content": "", "tool_calls": calls}, answers)
        ends = [
            at
            for i in self.encoder.tokenizer.eos_ids
            if (at := behind.find(self.encoder.tokenizer.decode_all([i]))) >= 0
        ]
        tail = behind[min(ends) :] if ends else ""
        return tail if whole.endswith(tail) else ""

    def _behind(self, mark: str, message: Message, answers: list[Message]) -> str:
        try:
            text = self.encoder.apply([*self.messages, message, *answers], add_generation_prompt=True)
        except ValueError:
            return ""
        return text.rpartition(mark)[2] if mark in text else ""

    def _behind_turn(self, text: str, ids: Sequence[int], forged: int) -> Continuation:
        """The continuation with a text behind the turn whose tokens are `ids`; the turn's end may be its beginning."""
        last = [i for i in ids[-1:] if i in self.encoder.tokenizer.eos_ids]
        end = self.encoder.tokenizer.decode_all(last)
        more = text.removeprefix(end)
        # With the end in front, so that the tokenizer meets the text where it is.
        found = self._encoded(end + more)
        more_ids = found[len(last) :] if found[: len(last)] == last else self._encoded(more)
        return Continuation(ids=tuple(more_ids), is_rewritten=False, text=more, forged=forged)

    def _encoded(self, text: str) -> list[int]:
        return self.encoder.tokenizer.encode_all([text], add_special_tokens=False)[0]


def _opened(start: str) -> str:
    """The thought that a prompt opens, or opens and closes, at its end."""
    return match[0] if (match := _OPENED.search(start)) else ""


def _shows(turn: str, way: Message, start: str) -> bool:
    """Whether the template's text of a turn has all that its message says: thought, content, and calls."""
    thought, content = str(way.get("reasoning_content", "")), str(way["content"]).removeprefix(_opened(start))
    is_closed = bool(thought) or _CLOSE in content
    if not thought and is_closed:
        thought, _, content = content.partition(_CLOSE)
        thought = thought.strip().removeprefix(_OPEN)
    if is_closed and _CLOSE not in turn and not start.rstrip().endswith(_CLOSE):
        return False
    at = turn.find(thought.strip())
    names = [str(call["function"]["name"]) for call in way.get("tool_calls", ())]
    return at >= 0 and turn.find(content.strip(), at) >= 0 and all(name in turn for name in names)


def _call(call_id: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


_MARK, _ANSWER = "swordfish", "kingfisher"
"""Words that no template contains, for a made-up turn and its answer."""


def check_template(encoder: Encoder, wanted: str) -> None:
    """Try a made-up turn that calls a tool, or has a user's answer where the encoder has no tools.

    Raises ValueError naming the setting, where the template does not show tools, calls or answers, or refuses them,
    where it rewrites turns without thoughts, and where calls of the form `wanted` (environment.calls) cannot be told.
    """
    reader = reader_for(encoder, wanted)
    start = "" if encoder.template is None else encoder.render("?")
    names = [str(tool["function"]["name"]) for tool in encoder.tools]
    missing = [name for name in names if name not in start]
    if encoder.tools and not reader.has_calls:
        raise ValueError(
            "environment.calls: auto cannot tell how the policy calls tools here; name the form: hermes, llama3,"
            f" mistral or python{_and_no_tools(encoder) if missing else ''}"
        )
    if encoder.template is None:
        return
    if missing:
        raise ValueError(_unfit(f"does not show tools ({', '.join(missing)})"))
    turn, answer = _made_up(names[:1], is_thinking=start.rstrip().endswith(_OPEN))
    whole, more = _tried(encoder, message_of(turn, is_structured=reader.is_structured), turn.text, answer)
    turns = "the assistant's tool_calls" if names else "the assistant's turns"
    for word, what in ((_ANSWER, f"messages of role {answer['role']}"), (_MARK, turns)):
        if word not in whole:
            raise ValueError(_unfit(f"does not show {what}"))
    if names and any(one.is_rewritten for one in more):
        raise ValueError(_unfit("rewrites every turn, also one without a thought, so that no trajectory could go on"))
    said = whole[len(start) : len(whole) - len(more[0].text)]
    for end in encoder.tokenizer.eos_ids:
        said = said.removesuffix(encoder.tokenizer.decode_all([end]))
    read, written = ([(one.name, one.arguments) for one in calls] for calls in (reader.read(said)[1], turn.calls))
    if wanted == "auto" and names and read != written:
        raise ValueError(
            f"environment.calls: auto reads calls in the form {reader.form}, in which the template does not write"
            " them; name the form: hermes, llama3, mistral or python"
        )


def _made_up(names: Sequence[str], *, is_thinking: bool) -> tuple[Turn, Message]:
    """A turn that calls the tool of this name, and the tool's answer; without a name, words and a user's answer."""
    thought = f"Hm.\n{_CLOSE}\n\n" if is_thinking else ""
    calls = tuple(Call(name=name, arguments={"it": _MARK}, id="Probe0001") for name in names)
    turn = Turn(number=0, text=thought + _MARK, content=thought + ("" if calls else _MARK), calls=calls)
    if not calls:
        return turn, {"role": "user", "content": _ANSWER}
    return turn, {"role": "tool", "name": calls[0].name, "tool_call_id": calls[0].id, "content": _ANSWER}


def _tried(encoder: Encoder, reply: Message, text: str, answer: Message) -> tuple[str, list[Continuation]]:
    """(the whole text of a conversation with the turn and its answer, what follows the turn, also a second time)."""
    talk = Conversation(encoder, encoder.messages("?"))
    ids = [*encoder.tokenizer.encode_all([text], add_special_tokens=False)[0], encoder.tokenizer.eos_id]
    try:
        more = [talk.continued(reply, ids, [answer])]
        whole = encoder.apply(talk.messages, add_generation_prompt=True)
        return whole, [*more, talk.continued(reply, ids, [answer])]
    except ValueError as error:
        raise ValueError(_unfit(f"cannot go on with a message of role {answer['role']}: {error}")) from None


def _and_no_tools(encoder: Encoder) -> str:
    if encoder.template is None:
        return "; prompts show no tools either: set data.chat_template to tokenizer, or to a file"
    return f"; and {_unfit('does not show tools')}"


def _unfit(why: str) -> str:
    return f"data.chat_template: the template {why}; give it a file with a template made for tools"
