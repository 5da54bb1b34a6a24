"""The environments of sources before a run: they can be had, and the chat template works with their tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from megatron_opd.config import DataConfig, EnvironmentConfig
from megatron_opd.core.environment import EnvironmentKind
from megatron_opd.prompts.calls import OWN, CallReader
from megatron_opd.prompts.chat import Encoder
from megatron_opd.prompts.conversation import check_template, reader_for
from megatron_opd.rollout.worlds import kind_and_encoder


@dataclass(frozen=True, slots=True)
class SourceWorld:
    """The parts of an environment that prompts of a source need."""

    encoder: Encoder
    """The student's, with the environment's tools."""
    kind: EnvironmentKind | None
    """None: an answer is one turn."""
    notes: tuple[str, ...] = ()
    """How the two of them go together, for people."""


@dataclass(frozen=True, slots=True)
class SourceWorlds:
    """Environments that are built, each once for all sources that have it."""

    data: DataConfig
    encoder: Encoder
    """Encoder of prompts without an environment."""
    _found: dict[str, SourceWorld | str] = field(default_factory=dict)
    """By settings; a text says why there is none."""

    def of(self, settings: EnvironmentConfig) -> SourceWorld:
        """The environment of these settings. Raises ValueError naming what is wrong with them, with the machine, or
        with the chat template."""
        if not settings.is_on:
            return SourceWorld(self.encoder, None)
        key = json.dumps(asdict(settings), sort_keys=True)
        if key not in self._found:
            try:
                self._found[key] = self._built(settings)
            except ValueError as error:
                self._found[key] = str(error)
        found = self._found[key]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @property
    def notes(self) -> list[str]:
        """Lines for people about how they work here."""
        worlds = [world for world in self._found.values() if isinstance(world, SourceWorld)]
        kinds = [world.kind for world in worlds if world.kind]
        found = [*(note for world in worlds for note in world.notes), *(kind.note for kind in kinds if kind.note)]
        if self.encoder.template is None and any(kind.tools for kind in kinds):
            found.append("warning: data.chat_template is none, so prompts do not show the tools of the environment")
        return list(dict.fromkeys(found))

    def _built(self, settings: EnvironmentConfig) -> SourceWorld:
        kind, encoder = kind_and_encoder(settings, self.data, self.encoder.tokenizer)
        check_template(encoder, settings.calls)
        readers = [reader_for(encoder, form) for form in (settings.calls, "auto")]
        return SourceWorld(encoder, kind, (_note(settings, kind, readers[0]), *_warnings(settings, kind, *readers)))


def _note(settings: EnvironmentConfig, kind: EnvironmentKind, reader: CallReader) -> str:
    tools = ", ".join(str(tool["function"]["name"]) for tool in kind.tools)
    form = "by the tokenizer's response_template" if reader.form == OWN else f"in the form {reader.form}"
    calls = f"calls {form}" if reader.has_calls else "calls are not looked for"
    turns = "1 turn" if settings.max_turns == 1 else f"{settings.max_turns} turns"
    most = f"at most {turns} and {settings.max_tokens} tokens"
    return f"environment {kind.name}: {f'tools {tools}' if tools else 'no tools in the prompts'}; {calls}; {most}"


def _warnings(
    settings: EnvironmentConfig, kind: EnvironmentKind, reader: CallReader, shown: CallReader
) -> Iterator[str]:
    """`shown` reads calls as the chat template shows them."""
    if shown.has_calls and shown.form not in (OWN, reader.form):
        yield (
            f"warning: environment.calls is {reader.form}, and the chat template shows calls in the form {shown.form}:"
            " those are not seen"
        )
    if kind.tools and settings.max_turns == 1:
        yield "warning: environment.max_turns is 1: an episode ends with its first call, before a tool's answer is read"
