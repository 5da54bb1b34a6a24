"""What is asked of a pass over rows of logits, the rows, and the columns of statistics that a pass gives for each.

A pass knows log-probabilities only up to normalisers that lie on other shards, so it gives statistics that can be put
together afterwards (`exchange.py`), each exponential relative to the local maximum of its row:

    a = student logits / τ      t = Σ w_n teacher logits_n / τ      u = a - max a      v = t - max t

    student   max a, Σ e^u
    target    max t, Σ e^v, Σ e^u (u - v), Σ e^v (v - u)         an average of logits: it gives both KLs at once
    teacher n max t_n, Σ e^v_n, Σ e^u (u - v_n)                   an average of probabilities; the last for its metric
    sampler   Σ e^(u τ / τ_sampling)                              metrics at the sampling temperature

They are float64: there are few of them, and a nearly certain student's gradient is a small difference of large ones.

Shape suffixes: R rows, L local columns, N teachers, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_opd.loss.divergences import GKD

NOTHING = -1e30
"""The maximum of no columns; finite, so that differences are."""

Kind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The divergence between an ensemble of teachers and the student, and the metrics that come with it."""

    beta: float
    temperature: float
    ensemble: str
    """"logits" or "probs"."""
    num_teachers: int
    by_teacher: bool = False
    """Whether reverse KL to each teacher is wanted."""
    sampling_temperature: float | None = None
    """Where the student's log-probability of the sampled token is wanted at another temperature than the loss's."""
    divergence: str = GKD
    """A name of `DIVERGENCES`; kernels know only the default, which interpolates between the two KLs."""

    @property
    def kind(self) -> Kind:
        return "forward" if self.beta == 0 else "reverse" if self.beta == 1 else "jsd"

    @property
    def is_probs(self) -> bool:
        """Whether several distributions are averaged, which needs every teacher's normaliser. One is itself."""
        return self.ensemble == "probs" and self.num_teachers > 1

    @property
    def has_sums(self) -> bool:
        """Whether the loss needs sums that can only be made once the normalisers are known."""
        return self.is_probs or self.kind == "jsd"

    @property
    def sampler_ratio(self) -> float:
        """Loss temperature over sampling temperature; 0 where nothing is asked at that one."""
        if self.sampling_temperature in (None, self.temperature):
            return 0.0
        assert self.sampling_temperature is not None
        return self.temperature / self.sampling_temperature

    @property
    def has_target(self) -> bool:
        return not self.is_probs

    @property
    def has_teachers(self) -> bool:
        return self.is_probs or (self.by_teacher and self.num_teachers > 1)

    @property
    def first_teacher(self) -> int:
        """Column of the first teacher's."""
        return 6 if self.has_target else 2

    @property
    def teacher_columns(self) -> int:
        """Columns of one teacher: the last of three is for its KL, where asked for, and Triton's JSD."""
        return 3 if self.by_teacher or (self.is_probs and self.kind == "jsd") else 2

    @property
    def teachers_at(self) -> list[int]:
        """The first column of every teacher's."""
        count = self.num_teachers if self.has_teachers else 0
        return [self.first_teacher + self.teacher_columns * n for n in range(count)]

    @property
    def num_stats(self) -> int:
        return self.first_teacher + self.teacher_columns * len(self.teachers_at) + (self.sampler_ratio > 0)


S_MAX, S_SUM, T_MAX, T_SUM, GAP_S, GAP_T = range(6)
"""Columns of statistics with one target. A teacher's are like the target's first two or three."""
FIRST, SECOND, REVERSE = range(3)
"""Columns of the sums: a KL's value and 0, or with JSD KL(q||m) and KL(p||m); then KL(q||p)."""


def centers(stats_RK: torch.Tensor, sums_R3: torch.Tensor | None) -> torch.Tensor:
    """Expectation under q of log q - log p, or log q - log m: without it a row's gradient would not sum to 0; [R]."""
    if sums_R3 is not None:
        return sums_R3[:, FIRST]
    s_sum_R = stats_RK[:, S_SUM]
    return stats_RK[:, GAP_S] / s_sum_R - s_sum_R.log() + stats_RK[:, T_SUM].log()


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows of logits on one shard. The student's are overwritten by the gradient where one is asked for."""

    student_RL: torch.Tensor
    teachers: tuple[torch.Tensor, ...]
    """N tensors [R, L_n]; a teacher without weight at a row is not read there."""
    weights_RN: torch.Tensor
    """float32, contiguous; of the chosen rows, each summing to 1."""
    width: int
    """Real columns; what follows is padding, which is not read, and whose gradient is 0."""
    index_R: torch.Tensor | None = None
    """Which rows of the matrices are meant (int64); None: all."""

    @property
    def num_rows(self) -> int:
        return self.weights_RN.shape[0]

    def part(self, start: int, stop: int) -> LogitRows:
        """Some of the rows."""
        weights_RN = self.weights_RN[start:stop]
        if self.index_R is not None:
            return LogitRows(self.student_RL, self.teachers, weights_RN, self.width, self.index_R[start:stop])
        teachers = tuple(t[start:stop] for t in self.teachers)
        return LogitRows(self.student_RL[start:stop], teachers, weights_RN, self.width)

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """The rows and the real columns of a model's logits, [R, width]."""
        return logits[:, : self.width] if self.index_R is None else logits[self.index_R, : self.width]

    def replace_student(self, grad_RL: torch.Tensor) -> None:
        """Put a gradient [R, width] in place of the student's rows, and 0 into their padding."""
        rows = slice(None) if self.index_R is None else self.index_R
        self.student_RL[rows, : self.width] = grad_RL.to(self.student_RL.dtype)
        self.student_RL[rows, self.width :] = 0
