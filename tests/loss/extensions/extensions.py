"""Four extensions of the loss as somebody else would write them: a divergence, a carrier, a term, a metric.

Each one shows what the thing consists of. In the package it would be these lines in the file that is named, and a line
where the settings are read; nothing else knows about it.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar
from unittest.mock import patch

import torch

from megatron_opd.core import scores
from megatron_opd.core.scores import CARRIERS, Level
from megatron_opd.loss.divergences import DIVERGENCES
from megatron_opd.tracking.headline import Headline


def alpha(student_TL, target_TL, vocab, beta):
    """(1 - Σ p^β q^(1-β)) / (β (1 - β)), 0 < β < 1: Amari's. It would be in loss/divergences.py."""
    return (1 - vocab.sum((beta * target_TL + (1 - beta) * student_TL).exp())) / (beta * (1 - beta))


def total_variation(student_TL, target_TL, vocab, beta):
    """½ Σ |p - q|. It would be in loss/divergences.py."""
    return 0.5 * vocab.sum((student_TL.exp() - target_TL.exp()).abs())


@dataclass(frozen=True, slots=True)
class Rounded:
    """Hidden states as int8 with a scale for each token. It would be in core/scores.py."""

    level: ClassVar[Level] = Level.EXACT
    is_hidden: ClassVar[bool] = True
    values_RD: torch.Tensor
    scale_R: torch.Tensor

    @classmethod
    def of(cls, hidden_RD):
        scale_R = hidden_RD.abs().amax(-1) / 127
        return cls((hidden_RD / scale_R[:, None]).round().to(torch.int8), scale_R)

    @classmethod
    def joined(cls, its_scores, learnt_ids, device):
        return cls(*(x.to(device) for x in scores._with_fillers(its_scores, learnt_ids)))

    def at(self, rows):
        return Rounded(*(getattr(self, field.name)[rows] for field in fields(self)))

    def hidden(self):
        return self.values_RD.float() * self.scale_R[:, None]

    def read(self, rows, reader):
        return reader.exact(self.at(rows).hidden())

    def numbers_at(self, t):
        return self.scale_R[t]


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """-c H(q) at the student's own tokens, with its metric. It would be in loss/sampled_tokens.py, its coefficient in
    config/policy.py, and a line in trainer/build_objective.py."""

    coefficient: float

    def metric_names(self):
        return ["loss/entropy"]

    def headlines(self):
        return [Headline("loss/entropy", "bonus")]

    def __call__(self, batch, rows, student):
        logp_CL = student.logp(student.sampling_temperature)
        entropy_C = -student.vocab.sum(logp_CL.exp() * logp_CL)
        loss_C = -self.coefficient * entropy_C * batch.on_policy_T[rows]
        return loss_C, {"loss/entropy": loss_C}


@dataclass(frozen=True, slots=True)
class Surprise:
    """How often a token was less likely than 1 %: a metric without a loss. It would be in loss/sampled_tokens.py, and a
    line in trainer/build_objective.py."""

    def metric_names(self):
        return ["surprise"]

    def headlines(self):
        return []

    def __call__(self, batch, rows, student):
        logp_C = student.sampled(student.sampling_temperature).detach()
        return None, {"surprise": (logp_C.exp() < 0.01).double()}


@contextmanager
def installed():
    """The names in the tables."""
    added = {"alpha": alpha, "total_variation": total_variation}
    with patch.dict(DIVERGENCES, added), patch.dict(CARRIERS, {"rounded": Rounded}):
        yield
