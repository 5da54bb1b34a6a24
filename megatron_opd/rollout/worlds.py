"""Everything that the episodes of a source share: its environment, and how a conversation goes on in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_opd.config import DataConfig, EnvironmentConfig, TeacherConfig
from megatron_opd.config.environment import NONE
from megatron_opd.core.environment import EnvironmentKind, Message, Turn
from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.calls import CallReader
from megatron_opd.prompts.chat import Encoder, build_encoder
from megatron_opd.prompts.control import control_tokens
from megatron_opd.prompts.conversation import Continuation, Conversation, reader_for, render_later
from megatron_opd.prompts.views import build_views
from megatron_opd.rollout.environments.build import build_kind

_LEFT_OUT = "\n[... {}{} tokens left out ...]\n"
_CHARACTERS_A_TOKEN = 256
"""More than any token of a text that people read: of a longer text nobody counts the tokens in the middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A source's environment, and what reads and writes its turns."""

    kind: EnvironmentKind
    settings: EnvironmentConfig
    encoder: Encoder
    """The student's, with the environment's tools."""
    calls: CallReader
    room: int
    """Tokens of the longest trajectory."""
    views: Mapping[str, Encoder] = field(default_factory=dict)
    """By name, the encoders of teachers that see prompts of their own."""

    def turn(self, number: int, ids: tuple[int, ...]) -> Turn:
        """The turn that the sampled tokens are."""
        tokenizer = self.encoder.tokenizer
        said = ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids
        text = tokenizer.decode_all(said)
        content, calls = self.calls.read(text, number)
        return Turn(number=number, text=text, content=content, calls=calls, token_ids=ids)

    def shown(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """(the environment's messages without control tokens, the middle of long texts left out; the control tokens
        that they spelled)."""
        budget, found, forged = self.settings.output_tokens, list[Message](), 0
        for message in messages:
            text, used, spelled = self._cut(message["content"], budget)
            budget, forged = budget - used, forged + spelled
            found.append({**message, "content": text})
        return found, forged

    def prompt_of(self, prompt: Prompt, ids: tuple[int, ...], talk: Conversation) -> Prompt:
        """The prompt of a further trajectory: the whole conversation so far, as the template writes it now."""
        seen = {
            name: render_later(encoder, prompt.teacher_messages[name], talk) for name, encoder in self.views.items()
        }
        return replace(prompt, token_ids=ids, teacher_ids={**prompt.teacher_ids, **seen})

    def _cut(self, text: str, budget: int) -> tuple[str, int, int]:
        """(the text within so many tokens, the number that it has, the control tokens that were broken up in it)."""
        tokenizer, most = self.encoder.tokenizer, _CHARACTERS_A_TOKEN * max(budget, 1)
        is_long = len(text) > most
        if is_long:
            text = text[: most // 2] + text[len(text) - most // 2 :]
        # Before the tokens are counted: a control token is several, then.
        text, forged = control_tokens(tokenizer, self.encoder.template).broken(text)
        ids = tokenizer.encode_all([text], add_special_tokens=False)[0]
        if len(ids) <= budget and not is_long:
            return text, len(ids), forged
        half = min(budget, len(ids)) // 2
        left_out = _LEFT_OUT.format("over " if is_long else "", len(ids) - 2 * half)
        return (
            tokenizer.decode_all(ids[:half]) + left_out + tokenizer.decode_all(ids[len(ids) - half :]),
            budget,
            forged,
        )


def build_worlds(
    data: DataConfig,
    environment: EnvironmentConfig,
    teachers: Sequence[TeacherConfig],
    tokenizer: Tokenizer,
    *,
    context: int,
) -> dict[str, World]:
    """By name, the worlds of all sources that have an environment. `context` is the longest sequence of the models in
    tokens. Raises ValueError where an environment cannot be had."""
    found: dict[str, World] = {}
    built: list[tuple[EnvironmentConfig, EnvironmentKind, Encoder]] = []
    for source in (*data.train, *data.eval):
        settings = source.environment.or_of(environment)
        if settings.name == NONE or source.name in found:
            continue
        if settings not in [its for its, _, _ in built]:
            built.append((settings, *kind_and_encoder(settings, data, tokenizer)))
        kind, encoder = next((kind, encoder) for its, kind, encoder in built if its == settings)
        views = {view.teacher: view.encoder for view in build_views(teachers, data, source, encoder)}
        found[source.name] = World(
            kind=kind,
            settings=settings,
            encoder=encoder,
            calls=reader_for(encoder, settings.calls),
            room=min(settings.max_tokens, context),
            views=views,
        )
    return found


def kind_and_encoder(
    settings: EnvironmentConfig, data: DataConfig, tokenizer: Tokenizer
) -> tuple[EnvironmentKind, Encoder]:
    """An environment, and the encoder of prompts that show its tools and keep their messages. Raises ValueError where
    it cannot be had."""
    kind = build_kind(settings)
    return kind, build_encoder(data, tokenizer, tools=kind.tools, is_continued=True)


def goes_on(continuation: Continuation, before: int, room: int) -> bool:
    """Whether a token more fits behind a continuation of a trajectory of so many tokens."""
    return (0 if continuation.is_rewritten else before) + len(continuation.ids) < room
