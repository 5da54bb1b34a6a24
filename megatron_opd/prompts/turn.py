"""The assistant's turn as the student is to say it: what follows the prompt's text where an answer is known.

Templates write turns of the past otherwise than they open one for the model: thoughts are left out, or an empty one is
put in. So a turn is cut by where the template puts two made-up answers, and never by looking for the answer's text,
which may be part of the markers around it.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_opd.core.environment import Message

_OPEN, _CLOSE = "<think>", "</think>"
_CHANGED = "the chat template changes the answer, so it cannot be told what the student is to say"

Apply = Callable[[Message], str]
"""The text of a whole conversation whose last message is the one given."""


def turn_of(apply: Apply, rendered: str, reply: Message) -> str:
    """What follows the `rendered` prompt where the assistant's message is `reply`, its end of turn included.

    A thought of `reply` (`reasoning_content`, or `<think>…</think>` in its content) stays in it, unless the prompt
    closes thinking itself. Raises ValueError where the template does not show it, or the message's `tool_calls`, and
    where the answer's place cannot be told.
    """
    whole = apply(reply)
    thought, content, is_inside = _parts(reply)
    has_thought = bool(thought)
    if has_thought and rendered.rstrip().endswith(_CLOSE):  # the prompt says not to think
        reply = {name: x for name, x in reply.items() if name != "reasoning_content"} | {"content": content}
        whole, has_thought = apply(reply), False
    if whole.startswith(rendered) and (not has_thought or thought in whole[len(rendered) :]):
        said = whole[len(rendered) :]
    else:
        shown, end = _cut(apply, reply, whole)
        is_open = rendered.rstrip().endswith(_OPEN)
        if has_thought and not is_open and not is_inside:
            raise ValueError(
                "the chat template does not show the assistant's reasoning_content, so the student would learn not to"
                " think; use a template that shows it, or take the field out"
            )
        if has_thought:
            shown = f"{thought}\n{_CLOSE}\n\n{content}" if is_open else str(reply["content"]).strip()
        said = shown + end
    if content.strip() not in said:
        raise ValueError(_CHANGED)
    _check_calls(reply, said)
    return said


def _parts(reply: Message) -> tuple[str, str, bool]:
    """(thought, content without it, whether the thought stands in the content) of a message."""
    content = str(reply["content"])
    if reply.get("reasoning_content"):
        return str(reply["reasoning_content"]).strip(), content, False
    before, closed, after = content.partition(_CLOSE)
    if not closed:
        return "", content, False
    return before.strip().removeprefix(_OPEN).strip(), after.strip(), True


def _cut(apply: Apply, reply: Message, whole: str) -> tuple[str, str]:
    """(what the template shows of the content, what it puts behind it), by where it puts other contents."""
    plain = {name: x for name, x in reply.items() if name != "reasoning_content"}
    probes = [apply({**plain, "content": content}) for content in "XY"]
    front = _common(*probes)
    back = _common(*(probe[::-1] for probe in probes))
    if [probe[front : len(probe) - back] for probe in probes] != ["X", "Y"] or len(whole) < front + back:
        raise ValueError(_CHANGED)
    end = probes[0][front + 1 :]
    if whole[:front] != probes[0][:front] or not whole.endswith(end):
        raise ValueError(_CHANGED)
    return whole[front : len(whole) - back], end


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _check_calls(reply: Message, said: str) -> None:
    """Raises ValueError where the turn lacks a tool that the message calls."""
    for call in reply.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in said:
            raise ValueError(
                f"the chat template does not show the assistant's tool_calls ({name}), so the student would learn not"
                " to call; use a template that shows them, or take the field out"
            )
