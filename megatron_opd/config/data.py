"""Prompts, and how answers to them are graded."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

from megatron_opd.config.environment import OF_THE_RUN, EnvironmentConfig
from megatron_opd.config.section import AtLeastOne, Count, FilePath, Positive, section


@section
class SourceConfig:
    """One file or data set of prompts."""

    name: str
    """Name of the source: the key for teacher routing and the column in evaluation tables."""
    path: FilePath
    """File of prompts, .jsonl (or .jsonl.gz), .json or .parquet; or `hf:` and the name of a data set of the Hugging
    Face hub."""
    weight: Positive = 1.0
    """Share of this source in a batch, relative to the other sources."""
    rows: Count = 0
    """Largest number of rows to read, from the first one on; 0: all."""
    prompt_field: str = "prompt"
    """Field of a row with the prompt: a text, or messages (`role` and `content`); a.b is field b of field a. A row
    without it may have `messages`."""
    answer_field: str = "answer"
    """Field of a row with the reference answer; without it, the assistant's last message is the answer."""
    subset: str = ""
    """Subset of a data set of the hub (its configuration), e.g. main."""
    split: str = "train"
    """Split of a data set of the hub."""
    reward: str = "exact"
    """Grader of answers: exact (equal to `answer`), gsm8k (the final number is that of `answer`), math (the mathematics
    of `answer`, by math-verify), code (passes `tests`, which call `entry_point`), ifeval (follows
    `instruction_id_list`), environment (what the environment says), none (answers are not graded), or your own as
    module:function; see docs/rewards.md."""
    environment: EnvironmentConfig = dataclasses.field(default_factory=lambda: EnvironmentConfig(name=OF_THE_RUN))
    """Environment of this source; without it, the one of the whole run."""


@section
class DataConfig:
    """The prompts."""

    train: list[SourceConfig]
    """Sources of training prompts."""
    eval: list[SourceConfig] = dataclasses.field(default_factory=list)
    """Sources of evaluation prompts, each with its own `reward`."""
    max_prompt_tokens: AtLeastOne = 1024
    """Longest prompt in tokens, including those of the chat template."""
    on_too_long: Literal["error", "drop"] = "error"
    """Reaction to a longer prompt: error (the message names its line), or drop (it is left out and counted)."""
    chat_template: FilePath = "none"
    """Chat template: none (prompts are texts, which the model reads as they are), tokenizer (the template of the
    student's tokenizer, for prompts and messages), or a file with a Jinja template."""
    chat_template_options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    system_prompt: str = ""
    """System message of every prompt that has none; needs a chat template."""
    on_change: Literal["error", "accept"] = "error"
    """Reaction where a run continues and a source of data.train has other prompts than its checkpoint was made with:
    an error that says which and where (error), or the run draws from the new ones at the same place, and train.log says
    so (accept)."""


@section
class RewardsConfig:
    """How answers are graded, where a source's reward has a choice."""

    code_timeout_s: Positive = 10.0
    """Longest time in which an answer of the reward code can pass its tests, in seconds."""
    code_memory_mb: AtLeastOne = 512
    """Largest address space of a process that runs an answer, in MiB."""
    code_workers: AtLeastOne = 4
    """Answers of the reward code that one replica tests at a time; each takes up to two processes."""
    thinking: list[str] = dataclasses.field(default_factory=list)
    """Markers that open and close a model's thinking, two of them; only the text behind it is graded. Empty: the
    markers of the student's tokenizer or chat template, [THINK] or <thinking>, else <think> and </think>."""
    watch: bool = True
    """Grading of the student's training answers where no term of the loss needs it, for the metrics `reward/…`. Rows
    without what their reward needs are left out, and a reward that fails is a warning. `time/grade` is what it takes:
    the reward code runs every answer in the sandbox, math may take 10 s for an odd one."""
    ifeval: Literal["prompt", "instruction"] = "prompt"
    """Value of the reward ifeval: prompt (1 for an answer that follows every instruction of its prompt, else 0), or
    instruction (the share of the instructions that it follows)."""


REWARDS = ("exact", "gsm8k", "math", "code", "ifeval", "environment", "none")


def problem_with_reward(name: str) -> str | None:
    """Why there is no reward of this name, as far as the name shows."""
    module, colon, function = name.partition(":")
    if name in REWARDS or (
        colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    ):
        return None
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"there is no reward '{name}'; known: {', '.join(REWARDS)}, or a function of yours as module:function{hint}"
