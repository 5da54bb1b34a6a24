"""Divergences between a target p (the teachers) and the student q, per token, over a possibly sharded vocabulary.

Inputs are normalised log-probabilities [T, L] as `VocabShard.log_softmax` gives them; outputs are nats per token [T].
No masks, no reduction, no temperature: those happen once, in `objective.py`. Nothing is clamped, so a negative
divergence would be a bug in sight. At the end is what the sampled token alone allows. Shape suffixes: T tokens, L local
vocabulary columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from megatron_opd.core.vocab import VocabShard


def kl(from_TL: torch.Tensor, to_TL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v)."""
    return vocab.sum(from_TL.exp() * (from_TL - to_TL))


def forward_kl(student_TL: torch.Tensor, target_TL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
    """KL(p || q): mass-covering; what cross-entropy on teacher samples estimates."""
    return kl(target_TL, student_TL, vocab)


def reverse_kl(student_TL: torch.Tensor, target_TL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
    """KL(q || p): mode-seeking; the objective of MiniLLM and of on-policy distillation."""
    return kl(student_TL, target_TL, vocab)


def jsd(student_TL: torch.Tensor, target_TL: torch.Tensor, vocab: VocabShard, beta: float) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    GKD, Agarwal et al. 2024 (arXiv:2306.13649), eq. 1. Its limits at beta 0 and 1 are 0; `divergence` special-cases
    them as the field does.
    """
    mix_TL = torch.logaddexp(target_TL + math.log(beta), student_TL + math.log1p(-beta))
    return beta * kl(target_TL, mix_TL, vocab) + (1 - beta) * kl(student_TL, mix_TL, vocab)


def gkd(student_TL: torch.Tensor, target_TL: torch.Tensor, vocab: VocabShard, beta: float) -> torch.Tensor:
    """One knob from forward KL (beta 0) over JSD(beta) to reverse KL (beta 1), as in GKD and TRL."""
    if beta == 0:
        return forward_kl(student_TL, target_TL, vocab)
    if beta == 1:
        return reverse_kl(student_TL, target_TL, vocab)
    return jsd(student_TL, target_TL, vocab, beta)


Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor, VocabShard, float], torch.Tensor]
"""(student [T, L], target [T, L], vocab, beta) -> nats [T]; autograd differentiates it."""
GKD = "gkd"
DIVERGENCES: dict[str, Formula] = {GKD: gkd}
"""By the name that `loss.divergence` gives. One line here makes a divergence run everywhere; the fused kernels know the
first one, and the others are computed by their formula (`fused/readable.py`)."""


def divergence(
    student_TL: torch.Tensor, target_TL: torch.Tensor, vocab: VocabShard, beta: float, name: str = GKD
) -> torch.Tensor:
    """The divergence of that name. Raises ValueError for one that there is not."""
    if name not in DIVERGENCES:
        raise ValueError(f"there is no divergence '{name}'; there are {', '.join(sorted(DIVERGENCES))}")
    return DIVERGENCES[name](student_TL, target_TL, vocab, beta)


def importance(student_T: torch.Tensor, behaviour_T: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """min(q/mu, cap) of sampled tokens from their log-probabilities [T], and where it was cut (bool). No gradient."""
    log_ratio_T = (student_T - behaviour_T).detach()
    return log_ratio_T.clamp(max=math.log(cap)).exp(), log_ratio_T > math.log(cap)


def sampled_reverse_kl(student_T: torch.Tensor, target_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Reverse KL from the sampled token y alone, as a policy gradient, [T] log-probabilities of y -> [T].

    With the advantage A = log p(y) - log q(y), which is a constant here, the value is -w A, the k1 estimate of
    KL(q || p) under the importance weights w = min(q(y)/mu(y), cap) of `importance`, and the gradient is
    -w A d(log q(y)). Summed over y ~ mu, with w not cut, that is sum_v q_v (log q_v - log p_v) d(log q_v), the exact
    gradient of KL(q || p), since sum_v q_v d(log q_v) = 0.

    The per-token reverse KL of Lu and Thinking Machines Lab, "On-Policy Distillation" (2025), with Tinker's
    importance-sampling loss; truncated weights as in Ionides 2008 and IMPALA (arXiv:1802.01561).
    """
    value_T = (weight_T * (student_T - target_T)).detach()
    return value_T * (1 + (student_T - student_T.detach()))
