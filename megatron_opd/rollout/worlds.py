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
from megatron_opd.prompts.conversation import Continuation, Conversation, reader_for, render_later
from megatron_opd.prompts.views import build_views
from megatron_opd.rollout.environments.build import build_kind

_LEFT_OUT = "\n[... {} tokens left out ...]\n"


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
        """What the sampled tokens say."""
        tokenizer = self.encoder.tokenizer
        said = ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids
        text = tokenizer.decode_all(said)
        content, calls = self.calls.read(text, number)
        return Turn(number=number, text=text, content=content, calls=calls, token_ids=ids)

    def shown(self, messages: Sequence[Message]) -> list[Message]:
        """The environment's messages, the middle of long texts left out. Raises ValueError for what is no message."""
        budget, found = self.settings.output_tokens, list[Message]()
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError('expected messages with text fields "role" and "content"')
            text, used = self._cut(message["content"], budget)
            budget -= used
            found.append({**message, "content": text})
        return found

    def prompt_of(self, prompt: Prompt, ids: tuple[int, ...], talk: Conversation) -> Prompt:
        """The prompt of a further trajectory: the whole conversation so far, as the template writes it now."""
        seen = {
            name: render_later(encoder, prompt.teacher_messages[name], talk) for name, encoder in self.views.items()
        }
        return replace(prompt, token_ids=ids, teacher_ids={**prompt.teacher_ids, **seen})

    def _cut(self, text: str, budget: int) -> tuple[str, int]:
        """(the text within so many tokens, the number that it has)."""
        text = text.encode("utf-8", "replace").decode()
        ids = self.encoder.tokenizer.encode_all([text], add_special_tokens=False)[0]
        if len(ids) <= budget:
            return text, len(ids)
        half, decode = budget // 2, self.encoder.tokenizer.decode_all
        cut = decode(ids[:half]) + _LEFT_OUT.format(len(ids) - 2 * half) + decode(ids[len(ids) - half :])
        return cut, budget


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
    for source in (*data.train, *data.eval):
        settings = source.environment.or_of(environment)
        if settings.name == NONE or source.name in found:
            continue
        kind = build_kind(settings)
        encoder = build_encoder(data, tokenizer, tools=kind.tools, is_continued=True)
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


def goes_on(continuation: Continuation, before: int, room: int) -> bool:
    """Whether a token more fits behind a continuation of a trajectory of so many tokens."""
    return (0 if continuation.is_rewritten else before) + len(continuation.ids) < room
