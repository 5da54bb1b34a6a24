"""The loss that a pass computes, the rows it computes it for, and the columns of statistics that it gives for each.

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

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from megatron_opd.loss.divergences import GKD

NOTHING = -1e30
"""The maximum of no columns; finite, so that differences are."""

Kind = Literal["forward", "reverse", "jsd"]


class TargetColumns(NamedTuple):
    """Columns of what the student is compared with: the target, or one teacher. None: that one is not kept."""

    max: int
    sum: int
    gap_s: int | None
    """Σ e^u (u - v)."""
    gap_t: int | None = None
    """Σ e^v (v - u)."""


S_MAX, S_SUM = range(2)
"""The student's columns."""
T_MAX, T_SUM, GAP_S, GAP_T = range(2, 6)
"""The target's, where there is one; a teacher's come behind (`LossSpec.teachers`), the sampler's last."""
TARGET = TargetColumns(T_MAX, T_SUM, GAP_S, GAP_T)


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

    kind: Kind = field(init=False)
    is_probs: bool = field(init=False)
    """Whether several distributions are averaged, which needs every teacher's normaliser. One is itself."""
    has_sums: bool = field(init=False)
    """Whether the loss needs sums that can only be made once the normalisers are known."""
    sampler_ratio: float = field(init=False)
    """Loss temperature over sampling temperature; 0 where nothing is asked at that one."""
    has_target: bool = field(init=False)
    """Whether there are columns of one target, `TARGET`."""
    teachers: tuple[TargetColumns, ...] = field(init=False)
    """Every teacher's columns; nothing where their own are not needed."""
    has_teachers: bool = field(init=False)
    first_teacher: int = field(init=False)
    """Column where the teachers' begin."""
    teacher_columns: int = field(init=False)
    """Columns of one teacher."""
    num_stats: int = field(init=False)
    """K."""

    def __post_init__(self) -> None:
        """Compute everything that follows from the settings."""
        kind: Kind = "forward" if self.beta == 0 else "reverse" if self.beta == 1 else "jsd"
        is_probs = self.ensemble == "probs" and self.num_teachers > 1
        tau = self.sampling_temperature
        sampler_ratio = 0.0 if tau is None or tau == self.temperature else self.temperature / tau
        first = 2 if is_probs else 6
        has_gap = self.by_teacher or (is_probs and kind == "jsd")  # for a teacher's KL, and for Triton's JSD
        each = 3 if has_gap else 2
        count = self.num_teachers if is_probs or (self.by_teacher and self.num_teachers > 1) else 0
        starts = [first + each * n for n in range(count)]
        found = {
            "kind": kind,
            "is_probs": is_probs,
            "has_sums": is_probs or kind == "jsd",
            "sampler_ratio": sampler_ratio,
            "has_target": not is_probs,
            "teachers": tuple(TargetColumns(at, at + 1, at + 2 if has_gap else None) for at in starts),
            "has_teachers": count > 0,
            "first_teacher": first,
            "teacher_columns": each,
            "num_stats": first + each * count + (sampler_ratio > 0),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def targets(self) -> tuple[TargetColumns, ...]:
        """The columns of everything that the student is compared with."""
        return (*([TARGET] if self.has_target else []), *self.teachers)


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
    """Indices of the rows of the matrices (int64); None: all rows."""

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
