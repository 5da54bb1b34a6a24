"""Prompts as the model wants to see them: plain text as it is, or messages through a chat template.

The student's tokenizer does both; teachers get the same ids, so they see the same template.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from megatron_opd.config import DataConfig
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.turn import turn_of

Messages: TypeAlias = list[dict[str, Any]]
"""Turns of a conversation, each with `role` and `content`; templates may read more."""

SYSTEM_ROLES = ("system", "developer")
_ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Encoder:
    """From what a row asks to token ids."""

    tokenizer: Tokenizer
    template: str | None = None
    """The template's text; None: prompts are encoded as they are, and messages are refused."""
    system_prompt: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of tools, which the template shows in every prompt."""
    is_continued: bool = False
    """Whether an environment adds messages to the prompts, which then keep their own."""

    def render(self, asked: str | Messages) -> str:
        """The text that the model gets. Raises ValueError where the template refuses, or is missing for messages."""
        if self.template is None:
            if isinstance(asked, str):
                return asked
            raise ValueError('messages need a chat template: set data.chat_template to "tokenizer" or to a file')
        return self.apply(self.messages(asked), add_generation_prompt=True)

    def turn(self, asked: str | Messages, rendered: str, reply: dict[str, Any]) -> str:
        """What follows the `rendered` prompt where the assistant's message is `reply`: with a template, also its end of
        turn. Raises ValueError where that cannot be told, as `turn_of` does."""
        if self.template is None:
            return str(reply["content"])
        before = self.messages(asked)
        return turn_of(lambda last: self.apply([*before, last], add_generation_prompt=False), rendered, reply)

    def messages(self, asked: str | Messages) -> Messages:
        """The messages that the template gets for `asked`: the system's message included, a text as the user's."""
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if self.system_prompt and messages[0]["role"] not in SYSTEM_ROLES:
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def kept(self, asked: str | Messages) -> tuple[dict[str, Any], ...]:
        """The messages that a prompt keeps, where an environment adds others to them. Raises ValueError where they
        hold what is no JSON, such as a date of a Parquet file."""
        if not self.is_continued:
            return ()
        messages = self.messages(asked)
        try:
            json.dumps(messages)
        except TypeError as error:
            raise ValueError(f"messages that an environment adds to must be JSON: {error}") from None
        return tuple(messages)

    def apply(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Raises ValueError where the template refuses it."""
        try:
            return str(
                self.tokenizer.hf.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=[dict(tool) for tool in self.tools] or None,
                    chat_template=self.template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **self.options,
                )
            )
        except Exception as error:  # of any kind: templates compute with what messages have
            raise ValueError(f"the chat template refuses it: {error}") from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts. A template writes the special tokens itself; other prompts get the tokenizer's."""
        return self.tokenizer.encode_all(texts, add_special_tokens=self.template is None)


def build_encoder(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    is_continued: bool = False,
) -> Encoder:
    """The encoder of the settings, with the tools of an environment where there is one.

    Raises ValueError naming the setting that does not fit the tokenizer or template.
    """
    if data.chat_template == "none":
        return Encoder(tokenizer, tools=tuple(tools), is_continued=is_continued)
    template = _template(data.chat_template, tokenizer, tools)
    unknown = [name for name in data.chat_template_options if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unknown:  # which jinja would ignore
        raise ValueError(f"data.chat_template_options: the chat template has no variable {', '.join(unknown)}")
    taken = set(inspect.signature(tokenizer.hf.apply_chat_template).parameters) | {"messages"}
    if clashing := sorted(taken & set(data.chat_template_options)):
        raise ValueError(f"data.chat_template_options: {', '.join(clashing)} cannot be set here")
    encoder = Encoder(tokenizer, template, data.system_prompt, data.chat_template_options, tuple(tools), is_continued)
    try:
        encoder.render("?")
    except ValueError as error:
        hint = "; it may not take a data.system_prompt" if data.system_prompt else ""
        raise ValueError(f"data.chat_template ({data.chat_template}), tried with one message: {error}{hint}") from None
    return encoder


def _template(setting: str, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    if setting == "tokenizer":
        try:  # some tokenizers have another template for tools
            return str(tokenizer.hf.get_chat_template(tools=list(tools) or None))
        except ValueError:
            raise ValueError(
                "data.chat_template: the tokenizer of student.model has no (default) chat template;"
                " give a template file, or none for plain prompts"
            ) from None
    try:
        return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template is neither none nor tokenizer nor a file that can be read: {error}"
        ) from None


def checked(messages: list[Any]) -> Messages:
    """The messages of a row, without fields that are null (Parquet fills them in). Raises ValueError naming the first
    that is malformed."""
    if not messages:
        raise ValueError("there are no messages")
    found = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
            message = {**message, "content": ""}  # a call needs no words
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'message {number}: expected an object with text fields "role" and "content"')
        if message["role"] not in _ROLES:
            raise ValueError(f"message {number}: unknown role {message['role']!r}; known: {', '.join(_ROLES)}")
        found.append({name: value for name, value in message.items() if value is not None})
    return found
