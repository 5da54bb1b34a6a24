"""The loss between a student and a teacher that cut text differently, span by span (`align.py`).

A model's distribution at a span is over its whole vocabulary and one outcome more. With tokens x_1 … x_n of the span,
    merge "first":  P(y) = p_1(y) · Π_{i>1} p_i(x_i)      y, and then the span goes on as it did
    merge "last":   P(y) = Π_{i<n} p_i(x_i) · p_n(y)      the span begins as it did, and ends with y
where row i is the one that predicts token i, and the outcome "anything else" holds the mass that is left: so P is a
distribution, and a span of one token has the model's own.

    matched   D_β(P, Q) over the M tokens that both have and the rest together: never negative, 0 when the models agree
    unmatched Σ |sort(P_only) - sort(Q_only)|, descending, the shorter one filled with zeros
    loss      w·matched + (1 - w)·unmatched;  w = M / |teacher's vocabulary| unless it is given

Universal Logit Distillation: Boizard et al. 2024 (arXiv:2402.12030), the sorted L1 alone. GOLD (Patiño et al.,
Hugging Face 2025) adds spans and matched tokens. Two things differ from its trainer on purpose: that one reads the rows
of "observed" spans one position late, and compares matched tokens without the rest, which can be negative.

Shape suffixes: G spans, V a whole vocabulary, M matched ids, R rows (tokens) of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opd.config import CrossTokenizerConfig
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import divergence, reverse_kl
from megatron_opd.loss.crosstok.matched import Matched
from megatron_opd.loss.divergences import GKD


@dataclass(frozen=True, slots=True)
class Spans:
    """A model at G spans."""

    logp_GV: torch.Tensor
    """Log-probabilities of the row that stays a distribution: of the first or last token of each span, normalised."""
    others_G: torch.Tensor
    """Summed log-probabilities of the span's other tokens as they were; 0 for a span of one token."""
    kept_G: torch.Tensor
    """Log-probability that the kept row gives to the token that came."""

    def came(self) -> torch.Tensor:
        """Log-probability of the span's text as it was cut, [G]."""
        return self.kept_G + self.others_G

    def at(self, ids_M: torch.Tensor) -> torch.Tensor:
        """Log P of some ids, [G, M]."""
        return self.logp_GV[:, ids_M] + self.others_G[:, None]

    def with_rest(self, ids_M: torch.Tensor, rest_ids: torch.Tensor) -> torch.Tensor:
        """Log P of some ids and of everything else, [G, M + 1].

        The rest is a sum of what it consists of, other ids and other continuations, never one minus what is listed.
        """
        tiny = torch.finfo(self.logp_GV.dtype).tiny
        ids_mass_G = self.logp_GV[:, rest_ids].exp().sum(-1)
        rest_G = self.others_G.exp() * ids_mass_G - torch.expm1(self.others_G)
        return torch.cat([self.at(ids_M), rest_G.clamp_min(tiny).log()[:, None]], dim=-1)


def uld(
    student: Spans, teacher: Spans, matched: Matched, how: CrossTokenizerConfig, *, beta: float, name: str = GKD
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(matched, unmatched) parts of the loss by span, with their weights, and KL(Q || P) over the outcomes of the
    matched part, without a gradient; [G] each. `name`: of the divergence."""
    student_GO = student.with_rest(matched.student_M, matched.student_only_A)
    teacher_GO = teacher.with_rest(matched.teacher_M, matched.teacher_only_B)
    space = VocabShard.whole(student_GO.shape[-1])
    with torch.no_grad():
        kl_G = reverse_kl(student_GO, teacher_GO, space)
    apart = matched if how.hybrid else matched.none()
    unmatched_G = sorted_l1(student.at(apart.student_only_A).exp(), teacher.at(apart.teacher_only_B).exp())
    if not how.hybrid:
        return torch.zeros_like(kl_G), unmatched_G, kl_G
    w = len(matched.teacher_M) / teacher.logp_GV.shape[-1] if how.adaptive else how.matched_weight
    return w * divergence(student_GO, teacher_GO, space, beta, name), (1 - w) * unmatched_G, kl_G


def sorted_l1(student_GA: torch.Tensor, teacher_GB: torch.Tensor) -> torch.Tensor:
    """Distance of the two sets of probabilities, whichever token each belongs to, [G]."""
    student_GA, teacher_GB = (x.sort(-1, descending=True).values for x in (student_GA, teacher_GB))
    missing = student_GA.shape[-1] - teacher_GB.shape[-1]
    student_GA = torch.nn.functional.pad(student_GA, (0, max(-missing, 0)))
    teacher_GB = torch.nn.functional.pad(teacher_GB, (0, max(missing, 0)))
    return (student_GA - teacher_GB).abs().sum(-1)


def other_tokens(came_R: torch.Tensor, spans_G2: torch.Tensor, kept_G: torch.Tensor) -> torch.Tensor:
    """Sum of the log-probabilities of a span's tokens but the kept one, [G]; exactly 0 for a span of one token."""
    first_G, stop_G = spans_G2.unbind(-1)
    lengths_G = stop_G - first_G
    span_S = torch.arange(len(spans_G2), device=came_R.device).repeat_interleave(lengths_G)
    offset_S = torch.arange(len(span_S), device=came_R.device) - (lengths_G.cumsum(0) - lengths_G)[span_S]
    row_S = first_G[span_S] + offset_S
    is_other_S = row_S != kept_G[span_S]
    return came_R.new_zeros(len(spans_G2)).index_add(0, span_S[is_other_S], came_R[row_S[is_other_S]])
