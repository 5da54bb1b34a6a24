"""The tools that a turn calls, read from its text.

Whatever the text is, reading it raises nothing: a call that cannot be read is a `Call` with a `problem`. A call within
a thought (`<think>…</think>`) is no call.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_opd.core.environment import Call, Schema
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.json_in_text import found_json

OWN, NOTHING, PYTHON = "own", "nothing", "python"
"""Forms besides those that a config names: the tokenizer's response template; no calls at all. And code."""
_OPEN, _CLOSE = "<think>", "</think>"
_LETTERS = string.ascii_letters + string.digits
_ID = re.compile(r"[A-Za-z0-9]{9}")

Taken = tuple[int, list[Call]] | None
"""(where the calls end in the text, the calls); None where there is none after all."""
Take = Callable[[str, re.Match[str], bool], Taken]
"""From the text, a match of what a call begins with, and whether nothing but blanks and thoughts stands before it."""


@dataclass(frozen=True, slots=True)
class CallReader:
    """Reads a turn of one form."""

    form: str
    """A form that environment.calls names, or OWN or NOTHING."""
    parse: Callable[[str], tuple[str, list[Call]]]
    """(the text without the calls, the calls without ids, but for those that the text gives)."""

    @property
    def has_calls(self) -> bool:
        """Whether it finds any calls at all."""
        return self.form != NOTHING

    @property
    def is_structured(self) -> bool:
        """Whether chat templates show such calls from a message's `tool_calls`; otherwise they are text."""
        return self.form not in (NOTHING, PYTHON)

    def read(self, text: str, number: int = 0) -> tuple[str, tuple[Call, ...]]:
        """(the turn's text without its calls, the calls); `number` is the turn's, so that ids differ between turns."""
        content, calls = self.parse(text)
        turn = _digest(f"{number}/{text}") if calls else b""  # once: a turn may have thousands of calls
        found, taken = list[Call](), set[str]()
        for at, call in enumerate(calls):
            is_own = _ID.fullmatch(call.id) and call.id not in taken
            found.append(call if is_own else replace(call, id=_id(turn, at)))
            taken.add(found[-1].id)
        return content, tuple(found)


def reader_of(
    tokenizer: Tokenizer, template: str | None, wanted: str, *, prompt: str = "", tools: Sequence[Schema] = ()
) -> CallReader:
    """The reader of the form `wanted`, one that environment.calls names.

    `auto` is the tokenizer's own (transformers' response template), else the form whose marks the chat `template`
    contains, else NOTHING, which finds no calls. `prompt`: text of a prompt, whose end shows how a turn begins, such as
    within a thought. `tools`: for forms that write numbers as they write text.
    """
    is_thinking = prompt.rstrip().endswith(_OPEN)
    form = wanted
    if wanted == "auto":
        form = _shown_in(template or "")
        if getattr(tokenizer.hf, "response_template", None):
            otherwise = _by_form(form, is_thinking)
            return CallReader(OWN, lambda text: _own(tokenizer.hf, text, prompt, tools) or otherwise(text))
    return CallReader(form, _by_form(form, is_thinking))


def _shown_in(template: str) -> str:
    marks = {"<tool_call>": "hermes", "[TOOL_CALLS]": "mistral", '"parameters"': "llama3", "<|python_tag|>": "llama3"}
    return next((form for mark, form in marks.items() if mark in template), NOTHING)


def _by_form(form: str, is_thinking: bool) -> Callable[[str], tuple[str, list[Call]]]:
    if form == NOTHING:
        return lambda text: (text, [])
    if form not in _FORMS:
        raise ValueError(f"environment.calls: there is no form {form!r}; there are: auto, {', '.join(_FORMS)}")
    opens, take = _FORMS[form]
    pattern = re.compile(f"{_OPEN}|{opens}", re.MULTILINE)
    return lambda text: _scanned(text, pattern, take, is_thinking)


def _scanned(text: str, opens: re.Pattern[str], take: Take, is_thinking: bool) -> tuple[str, list[Call]]:
    """(the text without the calls, the calls), from the left to the right."""
    at = free = _behind(text, 0) if is_thinking else 0
    kept, calls, cut = [], [], 0
    while match := opens.search(text, at):
        if match[0] == _OPEN:
            at = free = _behind(text, match.end())
            continue
        taken = take(text, match, not text[free : match.start()].strip())
        if taken is None:
            at = match.end()
            continue
        kept.append(text[cut : match.start()])
        calls.extend(taken[1])
        at = cut = free = taken[0]
    kept.append(text[cut:])
    return ("\n".join(filter(None, (one.strip() for one in kept))) if calls else text), calls


def _behind(text: str, at: int) -> int:
    """Where the thought ends that is open at `at`."""
    end = text.find(_CLOSE, at)
    return len(text) if end < 0 else end + len(_CLOSE)


def _hermes(text: str, match: re.Match[str], _: bool) -> Taken:
    value, end, problem = found_json(text, match.end())
    closed = re.compile(r"\s*(</tool_call>|\Z)").match(text, end)
    if not problem and closed:
        return closed.end(), [called(value)]
    # What goes wrong ends with its own mark, or where the next call begins.
    ends = re.compile(r"</tool_call>|(?=<tool_call>)|\Z").search(text, match.end())
    return ends.end() if ends else len(text), [Call(name="", problem=problem or "something follows its JSON object")]


def _llama3(text: str, match: re.Match[str], is_first: bool) -> Taken:
    is_tagged = match[0] != "{"
    at = match.end() if is_tagged else match.start()
    if not is_tagged and not is_first:
        return None
    calls: list[Call] = []
    while True:
        value, end, problem = found_json(text, at)
        looks = re.compile(r'\s*\{\s*"name"').match(text, at) if problem else _is_call(value)
        if not looks and not (is_tagged and not calls):
            return (at, calls) if calls else None
        if problem:
            return len(text), [*calls, Call(name="", problem=problem)]
        calls.append(called(value))
        more = re.compile(r"[\s;]*(?=\{)").match(text, end)
        if not more:
            return end, calls
        at = more.end()


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and ("parameters" in value or "arguments" in value)


def _mistral(text: str, match: re.Match[str], _: bool) -> Taken:
    value, end, problem = found_json(text, match.end())
    if problem:
        following = text.find(match[0], match.end())
        return len(text) if following < 0 else following, [Call(name="", problem=problem)]
    if not value:
        return end, [Call(name="", problem="the list of calls is empty")]
    return end, [called(one) for one in (value if isinstance(value, list) else [value])]


def _python(text: str, match: re.Match[str], _: bool) -> Taken:
    ends = re.compile(r"\Z" if match[0].startswith("<") else r"^```[ \t]*$|\Z", re.MULTILINE).search(text, match.end())
    begin, end = (ends.start(), ends.end()) if ends else (len(text), len(text))
    code = text[match.end() : begin].strip("\n")
    problem = "" if code.strip() else "there is no code"
    return end, [Call(name="", problem=problem) if problem else Call(name=PYTHON, arguments={"code": code})]


_FORMS: dict[str, tuple[str, Take]] = {
    "hermes": ("<tool_call>", _hermes),
    "llama3": (r"<\|python_tag\|>|\{", _llama3),
    "mistral": (r"\[TOOL_CALLS\]", _mistral),
    PYTHON: (r"<\|python_tag\|>|^```(?:python|py)[ \t]*\n", _python),
}
"""By name, what a call begins with (a regular expression), and the function that takes it from there."""


def called(value: Any) -> Call:
    """The call that a value of JSON is, without an id but its own; one with a problem where it is none."""
    if not isinstance(value, Mapping):
        return Call(name="", problem='the call must be a JSON object with "name" and "arguments"')
    name, given = value.get("name"), value.get("id")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name.strip():
        return Call(name="", problem='the call has no "name"')
    if not isinstance(arguments, Mapping):
        return Call(name="", problem=f'the "arguments" of {name[:80]!r} are no JSON object')
    return Call(name=name, arguments=dict(arguments), id=given if isinstance(given, str) else "")


def _own(hf: Any, text: str, prompt: str, tools: Sequence[Schema]) -> tuple[str, list[Call]] | None:
    """The message that the tokenizer's own response template reads; None where it fails."""
    try:
        message = hf.parse_response(text, prefix=prompt, tools=list(tools) or None)
        found = message.get("tool_calls") or []
        calls = [_strict(one.get("function", one) if isinstance(one, dict) else one) for one in found]
        content = message.get("content") or ""
    except Exception:  # of any kind: the parsers of its fields raise their own
        return None
    if not calls or not isinstance(content, str):
        return text, []
    thought = text[: _behind(text, 0)] + "\n\n" if _CLOSE in text else ""
    return thought + content, calls


def _strict(value: Any) -> Call:
    """The call that a value is, if it could be read as strictly as other forms are."""
    again, _, problem = found_json(json.dumps(value), 0)
    return Call(name="", problem=problem) if problem else called(again)


def _id(turn: bytes, at: int) -> str:
    number = int.from_bytes(_digest(f"{turn.hex()}/{at}")[:8], "big")
    return "".join(_LETTERS[number // len(_LETTERS) ** i % len(_LETTERS)] for i in range(9))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
