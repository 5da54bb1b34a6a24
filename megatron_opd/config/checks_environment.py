"""Problems of environments that the settings alone reveal; each names the setting to change."""

from __future__ import annotations

import difflib
import keyword
from collections import Counter
from collections.abc import Iterator

from megatron_opd.config import (
    AnswersConfig,
    DataConfig,
    EnvironmentConfig,
    Fp8Config,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_opd.config.environment import NONE, OF_THE_RUN, TOOLS

OWN_TOOLS = ("calculator", "python")
"""Tools that come with the environment tools."""


def check_environments(
    environment: EnvironmentConfig,
    data: DataConfig,
    *,
    answers: AnswersConfig,
    rollout: RolloutConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    fp8: Fp8Config,
) -> list[str]:
    """Every such problem; `environment` is the whole run's."""
    problems = []
    for setting, own in _written(environment, data):
        problems += _check_name(setting, own)
        problems += _check_tools(setting, own)
        problems += _check_options(setting, own)
        if own.name not in (NONE, OF_THE_RUN) and own.max_tokens <= rollout.max_new_tokens:
            problems.append(
                f"{setting}.max_tokens ({own.max_tokens}) must be above rollout.max_new_tokens"
                f" ({rollout.max_new_tokens}): a trajectory is a prompt and at least one turn"
            )
    problems += [*_check_rewards(environment, data), *_check_shared_names(environment, data)]
    if data.train and any(source.environment.or_of(environment).is_on for source in data.train):
        problems += _check_answers(answers)
        if data.chat_template != "none":  # without, nothing is written anew: an episode is one trajectory
            problems += _check_shapes(train, parallel, fp8)
    return problems


def notes(environment: EnvironmentConfig) -> list[str]:
    """Lines about settings that have no effect, as they are where a run is done again without its environment."""
    if environment.name != NONE or not (environment.tools or environment.options):
        return []
    return ["warning: environment.name is none: every answer is one turn, whatever else environment says"]


def _written(environment: EnvironmentConfig, data: DataConfig) -> Iterator[tuple[str, EnvironmentConfig]]:
    """Every environment of the config by its setting."""
    yield "environment", environment
    for kind, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            yield f"data.{kind}.{i}.environment", source.environment


def _check_name(setting: str, own: EnvironmentConfig) -> list[str]:
    of_a_source = setting != "environment"
    if own.name == OF_THE_RUN and not of_a_source:
        return ["environment.name: run is for a source; write none, tools, or a class of yours as module:Class"]
    if of_a_source and own.name in (NONE, OF_THE_RUN) and own != EnvironmentConfig(name=own.name):
        return [f"{setting} needs a name of its own: {setting}.name is {own.name}, and nothing else counts then;"
                " it takes no setting from the run's environment"]  # fmt: skip
    known = (NONE, TOOLS, *([OF_THE_RUN] if of_a_source else []))
    if own.name in known or _is_path(own.name):
        return []
    hint = _hint(own.name, known)
    return [f"{setting}.name: there is no environment '{own.name}'; known: {', '.join(known)}, or a class of yours as"
            f" module:Class{hint}"]  # fmt: skip


def _check_tools(setting: str, own: EnvironmentConfig) -> list[str]:
    if own.name != TOOLS:
        if own.tools and _is_path(own.name):
            return [f"{setting}.tools is for the environment tools; {own.name} has its own"]
        return []
    if not own.tools:
        return [f"{setting}.tools: at least one is needed: {', '.join(OWN_TOOLS)}, or a function of yours"]
    problems = []
    for i, tool in enumerate(own.tools):
        if tool not in OWN_TOOLS and not _is_path(tool):
            problems.append(
                f"{setting}.tools.{i}: there is no tool '{tool}'; known: {', '.join(OWN_TOOLS)}, or a function of yours"
                f" as module:function{_hint(tool, OWN_TOOLS)}"
            )
    if own.calls == "python" and all(tool.rpartition(":")[2] != "python" for tool in own.tools):
        problems.append(f"{setting}.calls: python is code for the tool python, which {setting}.tools does not have")
    names = Counter(tool.rpartition(":")[2] for tool in own.tools)
    twice = [name for name, count in names.items() if count > 1]
    return problems + [
        f"{setting}.tools: two tools are called '{name}'; the policy could not tell them apart" for name in twice
    ]


def _check_options(setting: str, own: EnvironmentConfig) -> list[str]:
    if not own.options or own.name in (NONE, OF_THE_RUN):
        return []
    if own.name == TOOLS:
        return [f"{setting}.options are keyword arguments of a class of yours; the environment tools takes none"]
    return [
        f"{setting}.options: '{name}' cannot be a keyword argument"
        for name in own.options
        if not name.isidentifier() or keyword.iskeyword(name)
    ]


def _check_rewards(environment: EnvironmentConfig, data: DataConfig) -> list[str]:
    problems = []
    for kind, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            name = source.environment.or_of(environment).name
            if source.reward == "environment" and name in (NONE, TOOLS):
                why = "its answers are one turn" if name == NONE else "the environment tools gives no rewards"
                problems.append(
                    f"data.{kind}.{i}.reward: environment is what the source's environment says, and {why}; choose a"
                    f" grader of answers, or set data.{kind}.{i}.environment.name to a class of yours"
                )
    return problems


def _check_shared_names(environment: EnvironmentConfig, data: DataConfig) -> list[str]:
    """A source is known by its name alone while episodes are played."""
    trained_on = {source.name: source.environment.or_of(environment) for source in data.train}
    return [
        f"data.eval.{i}.environment: the source '{source.name}' of data.train has another one; give one of the two"
        " another name, or both the same environment"
        for i, source in enumerate(data.eval)
        if trained_on.get(source.name, source.environment.or_of(environment)) != source.environment.or_of(environment)
    ]


def _check_answers(answers: AnswersConfig) -> list[str]:
    """Answers of others are one turn each."""
    problems = []
    if answers.lmbda < 1:
        problems.append(
            f"answers.lmbda ({answers.lmbda}) must be 1 where a source of data.train has an environment: answers of the"
            " data set and of teachers are one turn"
        )
    if answers.teacher_mixed_alpha:
        problems.append(
            "answers.teacher_mixed_alpha must be 0 where a source of data.train has an environment: the mixture of"
            " student and teacher plays no episodes"
        )
    return problems


def _check_shapes(train: TrainConfig, parallel: ParallelConfig, fp8: Fp8Config) -> list[str]:
    """Where an episode may become several trajectories, replicas have different numbers of micro-batches, the last of
    which may be smaller."""
    problems = []
    if fp8.student != "off" and fp8.recipe == "delayed" and not fp8.emulate and parallel.data > 1:
        problems.append(
            "precision.fp8.recipe: delayed compares scales of all replicas at every micro-batch, and episodes in"
            " environments may give them different numbers of those; take another recipe, e.g. tensorwise"
        )
    if parallel.pipeline == 1 or train.packing or train.micro_batch_size == 1:
        return problems
    instead = "train.micro_batch_size to 1" if parallel.context > 1 else "train.packing to true"
    return [
        *problems,
        "parallel.pipeline: an episode in an environment may become several trajectories, so micro-batches differ in"
        f" size, and stages exchange one shape; set {instead}",
    ]


def _is_path(name: str) -> bool:
    """Whether it has the form of module:name."""
    module, colon, inner = name.partition(":")
    return bool(colon) and inner.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
