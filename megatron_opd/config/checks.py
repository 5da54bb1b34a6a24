"""Problems that the settings alone reveal; each names the setting to change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from megatron_opd.config import (
    HUB,
    AnswersConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    PolicyConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    SourceConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_opd.config.checks_answers import check_answers, needs_teachers
from megatron_opd.config.checks_context import check_context
from megatron_opd.config.checks_environment import check_environments
from megatron_opd.config.checks_goals import check_goals
from megatron_opd.config.checks_lora import check_lora
from megatron_opd.config.checks_method import check_method, check_minibatches
from megatron_opd.config.checks_precision import check_precision
from megatron_opd.config.checks_serving import check_serving
from megatron_opd.config.data import problem_with_reward
from megatron_opd.config.models import crosses_tokenizers

_RESERVED = {"teachers": "ensemble", "data.eval": "all"}
"""Names that metrics use for the whole: kl/ensemble, eval/accuracy/all."""
_NO_TEACHER = "teachers: at least one teacher is needed"


def check(config: Config) -> list[str]:
    """Every problem that the settings alone reveal, each naming the setting to change."""
    c = config
    return [
        *_check_schedule(c.optim),
        *check_goals(c.train, c.data),
        *_check_layout(c.parallel, c.rollout, c.train),
        *check_context(c.parallel, c.teachers, c.train, longest=c.longest),
        *check_lora(c.lora),
        *_check_run(c.run),
        *([] if c.teachers or not needs_teachers(c.loss, c.policy, c.answers) else [_NO_TEACHER]),
        *_check_teachers(c.teachers, c.data),
        *_check_data(c.data, c.teachers),
        *_check_thinking(c.rewards),
        *check_serving(c.rollout, c.teachers, c.loss, c.parallel),
        *_check_tokenizers(c.teachers, c.answers, c.loss, c.policy, c.train),
        *check_method(c.loss, c.policy, c.rl, c.rollout),
        *check_minibatches(c.train, c.rollout, c.parallel),
        *check_answers(c.answers, c.teachers, c.loss, c.rollout),
        *check_environments(
            c.environment,
            c.data,
            answers=c.answers,
            rollout=c.rollout,
            train=c.train,
            parallel=c.parallel,
            fp8=c.precision.fp8,
        ),
        *check_precision(c.precision, c.student, c.teachers, has_adapters=c.lora.rank > 0),
    ]


def _check_schedule(optim: OptimConfig) -> list[str]:
    if optim.min_lr > optim.lr:
        return [f"optim.min_lr ({optim.min_lr}) must not be above optim.lr ({optim.lr})"]
    return []


def _check_layout(parallel: ParallelConfig, rollout: RolloutConfig, train: TrainConfig) -> list[str]:
    problems = []
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence needs parallel.tensor > 1")
    if parallel.tensor % parallel.expert:
        problems.append(f"parallel.expert ({parallel.expert}) must divide parallel.tensor ({parallel.tensor})")
    if rollout.prompts_per_step % parallel.data:
        problems.append(
            f"rollout.prompts_per_step ({rollout.prompts_per_step}) must be a multiple of"
            f" parallel.data ({parallel.data})"
        )
        return problems
    per_replica = rollout.prompts_per_step // parallel.data * rollout.samples_per_prompt
    if per_replica % train.micro_batch_size:
        problems.append(
            f"train.micro_batch_size ({train.micro_batch_size}) must divide the {per_replica} answers of a"
            " replica (rollout.prompts_per_step x rollout.samples_per_prompt / parallel.data)"
        )
    return problems


def _check_run(run: RunConfig) -> list[str]:
    problems = [] if run.dir else ["run.dir must not be empty"]
    return problems + ([] if run.dir.isprintable() else ["run.dir must not have line ends or tabs"])


def _check_teachers(teachers: list[TeacherConfig], data: DataConfig) -> list[str]:
    problems = [] if data.train else ["data.train: at least one source is needed"]
    problems += _check_names("teachers", teachers)
    problems += [
        f"teachers: the name '{t.name}' is also in names of files: letters, digits, spaces and . _ + - alone"
        for t in teachers
        if t.name and not re.fullmatch(r"[\w.+ -]+", t.name)
    ]
    problems += [*_check_names("data.train", data.train), *_check_names("data.eval", data.eval)]
    return problems + _check_weights(teachers, [*data.train, *data.eval])


def _check_data(data: DataConfig, teachers: list[TeacherConfig]) -> list[str]:
    problems = []
    for setting in ("system_prompt", "chat_template_options"):
        if getattr(data, setting) and data.chat_template == "none":
            problems.append(f"data.{setting} has no effect without a template; set data.chat_template")
    if data.chat_template == "none":
        problems += [
            f"teachers.{i}.system_prompt has no effect without a template; set data.chat_template"
            for i, teacher in enumerate(teachers)
            if teacher.system_prompt
        ]
    if not data.chat_template:
        problems.append("data.chat_template must be none, tokenizer, or a file")
    for kind, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if not source.path.startswith(HUB) and (source.subset or source.split != "train"):
                problems.append(f"data.{kind}.{i}: subset and split are for data sets of the hub (path {HUB}…)")
            if not (source.prompt_field and source.answer_field):
                problems.append(f"data.{kind}.{i}: prompt_field and answer_field must not be empty")
            if problem := problem_with_reward(source.reward):
                problems.append(f"data.{kind}.{i}.reward: {problem}")
    return problems


def _check_names(setting: str, named: Iterable[TeacherConfig | SourceConfig]) -> list[str]:
    """Names are keys of metrics and tables: present, unlike each other, and not the word for all of them."""
    names = [n.name for n in named]
    problems = [f"{setting}: the name '{n}' is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"{setting}: a name must not be empty" for n in names if not n]
    if _RESERVED.get(setting) in names:
        problems.append(f"{setting}: the name '{_RESERVED[setting]}' means all of them in metrics; choose another")
    return problems


def _check_weights(teachers: list[TeacherConfig], sources: list[SourceConfig]) -> list[str]:
    problems = []
    known = sorted({s.name for s in sources})
    for i, teacher in enumerate(teachers):
        for source in sorted(set(teacher.sources) - set(known)):
            near = difflib.get_close_matches(source, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"teachers.{i}.sources: there is no prompt source '{source}'{hint}")
    for source in known if teachers else []:
        if not any(t.weight_for(source) for t in teachers):
            problems.append(f"teachers: every weight for prompt source '{source}' is 0; give one teacher a weight")
    return problems


def _check_thinking(rewards: RewardsConfig) -> list[str]:
    thinking = rewards.thinking
    if thinking and (len(thinking) != 2 or not all(thinking) or thinking[0] == thinking[1]):
        return ["rewards.thinking: give two markers, e.g. [<think>, </think>], or none"]
    return []


def _check_tokenizers(
    teachers: list[TeacherConfig], answers: AnswersConfig, loss: LossConfig, policy: PolicyConfig, train: TrainConfig
) -> list[str]:
    """Settings that do not go with teachers that have another tokenizer."""
    if not crosses_tokenizers(teachers):
        return []
    problems = []
    for i, teacher in enumerate(teachers):
        if teacher.tokenizer != "own":
            problems.append(f"teachers.{i}.tokenizer: where one teacher has its own tokenizer, all must say own")
        if teacher.carrier != "hidden":
            problems.append(
                f"teachers.{i}.carrier: a teacher with its own tokenizer needs hidden, not {teacher.carrier}"
            )
    if answers.seq_kd or answers.teacher_mixed_alpha:
        problems.append("answers.seq_kd, answers.teacher_mixed_alpha: a teacher with its own tokenizer cannot sample")
    if loss.kind != "distribution":
        problems.append("loss.kind must be distribution where teachers have their own tokenizer")
    if policy.kl_coef > 0:
        problems.append("policy.kl_coef: the advantage of teachers with their own tokenizer is not known by token")
    problems += [
        f"train.{name}: teachers with their own tokenizer cannot answer the student's tokens"
        for name in ("eval_teachers", "eval_agreement")
        if getattr(train, name)
    ]
    return problems
