"""What the settings alone reveal to be wrong, each problem naming the setting to change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from megatron_opd.config import HUB, Config, SourceConfig, TeacherConfig
from megatron_opd.config.checks_answers import check_answers, needs_teachers
from megatron_opd.config.checks_context import check_context
from megatron_opd.config.checks_lora import check_lora
from megatron_opd.config.checks_method import check_method
from megatron_opd.config.checks_precision import check_precision
from megatron_opd.config.checks_serving import check_serving
from megatron_opd.config.data import problem_with_reward

_RESERVED = {"teachers": "ensemble", "data.eval": "all"}
"""Names that metrics use for the whole: kl/ensemble, eval/accuracy/all."""


def check(config: Config) -> list[str]:
    """Every problem that the settings alone reveal, each naming the setting to change."""
    return [
        *_check_schedule(config),
        *_check_layout(config),
        *check_context(config),
        *check_lora(config),
        *_check_teachers(config),
        *_check_data(config),
        *_check_rewards(config),
        *check_serving(config),
        *_check_tokenizers(config),
        *check_method(config),
        *check_answers(config),
        *check_precision(config),
    ]


def _check_schedule(config: Config) -> list[str]:
    optim, train, problems = config.optim, config.train, []
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr ({optim.min_lr}) must not be above optim.lr ({optim.lr})")
    if optim.warmup_steps and optim.warmup_steps >= train.updates_per_step * train.steps:
        several = "" if train.updates_per_step == 1 else " x train.minibatches x train.epochs"
        problems.append(
            f"optim.warmup_steps ({optim.warmup_steps}) must be below train.steps{several}"
            f" ({train.updates_per_step * train.steps})"
        )
    return problems


def _check_layout(config: Config) -> list[str]:
    parallel, problems = config.parallel, []
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence needs parallel.tensor > 1")
    if parallel.tensor % parallel.expert:
        problems.append(f"parallel.expert ({parallel.expert}) must divide parallel.tensor ({parallel.tensor})")
    if config.rollout.prompts_per_step % parallel.data:
        problems.append(
            f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) must be a multiple of"
            f" parallel.data ({parallel.data})"
        )
        return problems
    per_replica = config.rollout.prompts_per_step // parallel.data * config.rollout.samples_per_prompt
    if per_replica % config.train.micro_batch_size:
        problems.append(
            f"train.micro_batch_size ({config.train.micro_batch_size}) must divide the {per_replica} answers of a"
            " replica (rollout.prompts_per_step x rollout.samples_per_prompt / parallel.data)"
        )
    return problems


def _check_teachers(config: Config) -> list[str]:
    problems = [] if config.teachers or not needs_teachers(config) else ["teachers: at least one teacher is needed"]
    problems += [] if config.data.train else ["data.train: at least one source is needed"]
    if not config.run.dir:
        problems.append("run.dir must not be empty")
    if not config.run.dir.isprintable():
        problems.append("run.dir must not have line ends or tabs")
    problems += _check_names("teachers", config.teachers)
    problems += [
        f"teachers: the name '{t.name}' is also in names of files: letters, digits, spaces and . _ + - alone"
        for t in config.teachers
        if t.name and not re.fullmatch(r"[\w.+ -]+", t.name)
    ]
    problems += [*_check_names("data.train", config.data.train), *_check_names("data.eval", config.data.eval)]
    return problems + _check_weights(config)


def _check_data(config: Config) -> list[str]:
    problems = []
    for setting in ("system_prompt", "chat_template_options"):
        if getattr(config.data, setting) and config.data.chat_template == "none":
            problems.append(f"data.{setting} has no effect without a template; set data.chat_template")
    if not config.data.chat_template:
        problems.append("data.chat_template must be none, tokenizer, or a file")
    for kind, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for i, source in enumerate(sources):
            if not source.path.startswith(HUB) and (source.subset or source.split != "train"):
                problems.append(f"data.{kind}.{i}: subset and split are for data sets of the hub (path {HUB}…)")
            if not (source.prompt_field and source.answer_field):
                problems.append(f"data.{kind}.{i}: prompt_field and answer_field must not be empty")
    return problems


def _check_names(setting: str, named: Iterable[TeacherConfig | SourceConfig]) -> list[str]:
    """Names are keys of metrics and tables: present, unlike each other, and not the word for all of them."""
    names = [n.name for n in named]
    problems = [f"{setting}: the name '{n}' is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"{setting}: a name must not be empty" for n in names if not n]
    if _RESERVED.get(setting) in names:
        problems.append(f"{setting}: the name '{_RESERVED[setting]}' means all of them in metrics; choose another")
    return problems


def _check_weights(config: Config) -> list[str]:
    problems = []
    known = sorted({s.name for s in [*config.data.train, *config.data.eval]})
    for i, teacher in enumerate(config.teachers):
        for source in sorted(set(teacher.sources) - set(known)):
            near = difflib.get_close_matches(source, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"teachers.{i}.sources: there is no prompt source '{source}'{hint}")
    for source in known if config.teachers else []:
        if not any(t.weight_for(source) for t in config.teachers):
            problems.append(f"teachers: every weight for prompt source '{source}' is 0; give one teacher a weight")
    return problems


def _check_rewards(config: Config) -> list[str]:
    problems = []
    for setting, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for i, source in enumerate(sources):
            problem = problem_with_reward(source.reward)
            problems += [f"{setting}.{i}.reward: {problem}"] if problem else []
    thinking = config.rewards.thinking
    if thinking and (len(thinking) != 2 or not all(thinking) or thinking[0] == thinking[1]):
        problems.append("rewards.thinking: give two markers, e.g. [<think>, </think>], or none")
    return problems


def _check_tokenizers(config: Config) -> list[str]:
    """What teachers with another tokenizer do not allow."""
    if not config.crosses_tokenizers:
        return []
    problems = []
    for i, teacher in enumerate(config.teachers):
        if teacher.tokenizer != "own":
            problems.append(f"teachers.{i}.tokenizer: where one teacher has its own tokenizer, all must say own")
        if teacher.carrier != "hidden":
            problems.append(
                f"teachers.{i}.carrier: a teacher with its own tokenizer must tell hidden states, not {teacher.carrier}"
            )
    if config.answers.seq_kd or config.answers.teacher_mixed_alpha:
        problems.append("answers.seq_kd, answers.teacher_mixed_alpha: a teacher with its own tokenizer cannot sample")
    if config.loss.kind != "distribution":
        problems.append("loss.kind must be distribution where teachers have their own tokenizer")
    if config.policy.kl_coef > 0:
        problems.append("policy.kl_coef: the advantage of teachers with their own tokenizer is not known by token")
    if config.train.eval_teachers:
        problems.append("train.eval_teachers: teachers with their own tokenizer cannot answer the student's tokens")
    return problems
