"""The origin of training answers: the student itself, the data set, or a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_opd.config.section import NotNegative, bound, section


@section
class AnswersConfig:
    """Who answers the training prompts. By default the student answers all of them (on-policy)."""

    lmbda: Annotated[float, bound(ge=0, le=1, why="0 is off-policy, 1 is on-policy")] = 1.0
    """Fraction of the training prompts that the student answers itself, as in GKD; 1: on-policy, 0: off-policy. It is
    drawn prompt by prompt, so 0.5 is about half of every batch."""
    seq_kd: bool = False
    """Source of all other answers: a teacher that samples at rollout.temperature (true: sequence-level KD), or the data
    set's `answer_field` (false)."""
    teacher: str = ""
    """Name of the teacher that samples (seq_kd, teacher_mixed_alpha); empty: the one with the largest weight for the
    prompt's source, the first of equal ones."""
    sft_alpha: NotNegative = 0.0
    """Weight of the cross-entropy -log q(y) on answers that are not the student's."""
    distill_alpha: NotNegative = 1.0
    """Weight of the distillation (`loss`) on answers that are not the student's; with 0 teachers do not score them."""
    on_too_long: Literal["error", "cut"] = "error"
    """Reaction to an answer of the data set with more than rollout.max_new_tokens tokens: error (the message names its
    line), or cut (it then has no end-of-sequence token)."""
    teacher_mixed_alpha: Annotated[float, bound(ge=0, lt=1)] = 0.0
    """Share alpha of the teacher where answers are sampled from (1 - alpha) student + alpha teacher, token by token, as
    in MiniLLM (0.2 there). Their log-probabilities are the mixture's, for importance weights. Needs rollout.engine
    local."""

    @property
    def has_others(self) -> bool:
        """Whether anybody beside the student takes part in answering."""
        return self.lmbda < 1 or self.teacher_mixed_alpha > 0
