"""The settings of environments: tools, or a class of the user's own, answer the policy between its turns."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_opd.config.section import AtLeastOne, Positive, section

OF_THE_RUN = "run"
NONE = "none"
TOOLS = "tools"


@section
class EnvironmentConfig:
    """An environment, which answers the policy between its turns (docs/environments.md)."""

    name: str = NONE
    """Environment of the prompts: none (an answer is one turn), tools (the policy calls `tools`), a class of your own
    as module:Class; or run, at a source only (the environment of the whole run)."""
    tools: list[str] = dataclasses.field(default_factory=list)
    """Tools of the environment tools: calculator, python, or functions of your own as module:function."""
    options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Keyword arguments of a class of your own."""
    calls: Literal["auto", "hermes", "llama3", "mistral", "python"] = "auto"
    """Form of a tool call in the policy's text: hermes (JSON between <tool_call> and </tool_call>, as Qwen writes it),
    llama3 (a JSON object with `name` and `parameters`), mistral (a JSON list behind [TOOL_CALLS]), python (code between
    <|python_tag|> and the end, or in a block of Python, for the tool python), or auto (the tokenizer's own
    response template, else what the chat template shows)."""
    max_turns: AtLeastOne = 8
    """Largest number of the policy's turns in an episode."""
    max_tokens: AtLeastOne = 4096
    """Longest trajectory in tokens, its prompt included. An episode ends where no token more fits."""
    output_tokens: AtLeastOne = 512
    """Longest text of the environment behind one turn, in tokens; the middle of a longer one is left out."""
    turn_timeout_s: Positive = 30.0
    """Longest time that the environment may take to answer a turn, in seconds; then the episode ends."""
    episode_timeout_s: Positive = 600.0
    """Longest time of all of the environment's work in an episode, in seconds; then the episode ends."""

    @property
    def is_on(self) -> bool:
        """Whether something answers the policy. It must be the environment of a source (`or_of`)."""
        return self.name != NONE

    def or_of(self, run: EnvironmentConfig) -> EnvironmentConfig:
        """This environment of a source, or the run's where the source has none of its own."""
        return run if self.name == OF_THE_RUN else self
