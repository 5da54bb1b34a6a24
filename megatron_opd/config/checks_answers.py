"""Problems of `answers` and of teachers' own prompts; each names the setting to change."""

from __future__ import annotations

from collections.abc import Iterator

import jinja2

from megatron_opd.config import AnswersConfig, LossConfig, PolicyConfig, RolloutConfig, TeacherConfig
from megatron_opd.config.rollout_engines import ENGINES


def check_answers(
    answers: AnswersConfig, teachers: list[TeacherConfig], loss: LossConfig, rollout: RolloutConfig
) -> list[str]:
    """Every such problem."""
    problems = [
        *_check_off_policy(answers, loss, rollout, has_teachers=bool(teachers)),
        *_check_sampling_teachers(answers, teachers, rollout),
    ]
    for i, teacher in enumerate(teachers):
        problems += _check_prompt(f"teachers.{i}", teacher)
    return problems


def needs_teachers(loss: LossConfig, policy: PolicyConfig, answers: AnswersConfig) -> bool:
    """Whether something of the run asks a teacher, whatever their number."""
    is_taught = loss.weight > 0 or policy.kl_coef > 0
    distils = is_taught and (answers.lmbda > 0 or answers.sft_alpha == 0)
    return distils or answers.seq_kd or answers.teacher_mixed_alpha > 0


def sampling_teachers(answers: AnswersConfig, teachers: list[TeacherConfig]) -> Iterator[tuple[int, TeacherConfig]]:
    """Position and settings of the teachers that may be asked to sample."""
    if answers.seq_kd or answers.teacher_mixed_alpha:
        for i, teacher in enumerate(teachers):
            if answers.teacher in ("", teacher.name):
                yield i, teacher


def _check_off_policy(
    answers: AnswersConfig, loss: LossConfig, rollout: RolloutConfig, *, has_teachers: bool
) -> list[str]:
    """Settings of answers that are not the student's."""
    problems = []
    if answers.lmbda >= 1:
        unused = {"seq_kd": answers.seq_kd, "sft_alpha": answers.sft_alpha, "distill_alpha": answers.distill_alpha != 1}
        return [f"answers.{name} has no effect while answers.lmbda is 1" for name, is_set in unused.items() if is_set]
    if answers.sft_alpha == 0 and answers.distill_alpha == 0:
        problems.append(
            "answers.sft_alpha and answers.distill_alpha are both 0, so nothing is learnt on answers that are not the"
            " student's; raise one of them, or set answers.lmbda to 1"
        )
    if answers.lmbda == 0 and not answers.seq_kd and rollout.samples_per_prompt > 1:
        problems.append(
            f"rollout.samples_per_prompt ({rollout.samples_per_prompt}) must be 1 with answers.lmbda 0: a row of"
            " the data set has one answer"
        )
    if answers.distill_alpha and has_teachers and loss.kind == "sampled":
        problems.append(
            "loss.kind: sampled is a policy gradient of tokens that the student sampled; with answers.lmbda below 1 set"
            " answers.distill_alpha to 0, or loss.kind to distribution"
        )
    return problems


def _check_sampling_teachers(
    answers: AnswersConfig, teachers: list[TeacherConfig], rollout: RolloutConfig
) -> list[str]:
    """Settings of teachers that sample, alone or mixed with the student."""
    problems = []
    if answers.teacher and not (answers.seq_kd or answers.teacher_mixed_alpha):
        problems.append("answers.teacher has no effect without answers.seq_kd or answers.teacher_mixed_alpha")
    if answers.teacher and answers.teacher not in [t.name for t in teachers]:
        problems.append(f"answers.teacher: there is no teacher '{answers.teacher}'")
    mixes = answers.teacher_mixed_alpha > 0
    if mixes and not ENGINES[rollout.engine].mixes:
        problems.append("answers.teacher_mixed_alpha needs rollout.engine: local, which runs both models side by side")
    for i, teacher in sampling_teachers(answers, teachers):
        if mixes and teacher.is_served:
            problems.append(f"answers.teacher_mixed_alpha needs teachers.{i}.backend: megatron, not {teacher.backend}")
        if mixes and teacher.has_own_prompt:
            problems.append(
                f"answers.teacher_mixed_alpha needs teacher and student to see one prompt, but teachers.{i} has one of"
                " its own (prompt_field, prompt_template, system_prompt)"
            )
        if answers.seq_kd and not teacher.is_served and (rollout.top_p != 1 or rollout.top_k != 0):
            problems.append(
                f"answers.seq_kd: teachers.{i} samples in the embedded engine, which does not support"
                f" rollout.top_p and rollout.top_k; remove these, or serve it (teachers.{i}.backend: sglang)"
            )
    return problems


def _check_prompt(what: str, teacher: TeacherConfig) -> list[str]:
    if teacher.prompt_field and teacher.prompt_template:
        return [f"{what}: prompt_field and prompt_template exclude each other"]
    try:
        jinja2.Environment().parse(teacher.prompt_template)
    except jinja2.TemplateError as error:
        return [f"{what}.prompt_template is not a Jinja template: {error}"]
    return []
