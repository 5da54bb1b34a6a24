"""The objective of a run, from its settings and its teachers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.config import AnswersConfig, Config, PolicyConfig, RLConfig
from megatron_opd.config.policy import has_policy_gradient
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.crosstok.distillation_in_bytes import CrossTokenizer
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.loss.sampled_tokens import CrossEntropy, Entropy, PolicyGradient
from megatron_opd.loss.term import TeacherTerm, TokenTerm
from megatron_opd.teachers.scorer import TeacherScorer


def build_objective(
    config: Config, vocab: VocabShard, teachers: Sequence[TeacherScorer], *, has_answers_of_others: bool = False
) -> Objective:
    """The objective of a run's settings and its teachers, in order."""
    settings = config.loss, config.rollout.temperature, vocab, tuple(config.teachers)
    distillation: TeacherTerm
    if config.crosses_tokenizers:
        foreigners = tuple(teacher.foreigner for teacher in teachers)
        distillation = CrossTokenizer(*settings, config.cross_tokenizer, foreigners)
    else:
        distillation = Distillation(*settings, tuple(teacher.head_LD for teacher in teachers))
    sampled = sampled_terms(config.rl, config.policy, config.answers, has_answers_of_others)
    return Objective(distillation, sampled, has_answers_of_others)


def sampled_terms(
    rl: RLConfig, policy: PolicyConfig, answers: AnswersConfig, has_answers_of_others: bool
) -> tuple[TokenTerm, ...]:
    """The terms on sampled tokens that the settings ask for, a line each."""
    terms: list[TokenTerm] = []
    if has_policy_gradient(policy, rl):
        terms.append(PolicyGradient(policy))
    if has_answers_of_others and answers.sft_alpha > 0:
        terms.append(CrossEntropy())
    return (*terms, Entropy()) if terms or has_answers_of_others else ()
