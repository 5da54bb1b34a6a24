"""Where the answers that the student learns on come from: from itself, from the data set, or from a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_opd.config.section import NotNegative, bound, section


@section
class AnswersConfig:
    """Who answers the training prompts. By default the student answers all of them (on-policy)."""

    lmbda: Annotated[float, bound(ge=0, le=1, why="0 is off-policy, 1 is on-policy")] = 1.0
    """Fraction of the training prompts that the student answers itself, as in GKD; drawn prompt by prompt, so 0.5 is
    about half of every batch. 1: on-policy; 0: off-policy."""
    seq_kd: bool = False
    """Who answers the others: a teacher, which samples at rollout.temperature (true: sequence-level KD), or the data
    set, by `answer_field` of its rows (false)."""
    teacher: str = ""
    """Name of the teacher that samples (seq_kd, teacher_mixed_alpha); empty: of the prompt's source the one with the
    largest weight, the first of equal ones."""
    sft_alpha: NotNegative = 0.0
    """Weight of the cross-entropy -log q(y) on answers that are not the student's."""
    distill_alpha: NotNegative = 1.0
    """Weight of the distillation (`loss`) on answers that are not the student's; 0: teachers are not asked about
    them."""
    on_too_long: Literal["error", "cut"] = "error"
    """An answer of the data set with more than rollout.max_new_tokens tokens is an error that names its line, or is cut
    (and then has no end-of-sequence token)."""
    teacher_mixed_alpha: Annotated[float, bound(ge=0, lt=1)] = 0.0
    """The student's answers are sampled from (1 - alpha) student + alpha teacher, token by token, as in MiniLLM (0.2
    there); their log-probabilities are the mixture's, for importance weights. Needs rollout.engine local."""
