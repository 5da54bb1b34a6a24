"""Losses: the distillation loss for anybody, in two forms with one meaning, and the formulas that the trainer reads.

    distillation_loss(student_logits, [teacher_logits, ...], weights=, mask=, beta=, temperature=, ensemble=, vocab=)
    linear_distillation_loss(student_hidden, student_head, [(hidden, head), ...], the same settings)

Both are fused and vocabulary-parallel (`megatron_opd.loss.fused`; docs/performance.md has examples). The others, of
`divergences.py`, are textbook lines on log-probabilities.
"""

from megatron_opd.loss.divergences import divergence, forward_kl, importance, jsd, kl, reverse_kl, sampled_reverse_kl
from megatron_opd.loss.fused import NonFiniteLogits, distillation_loss, linear_distillation_loss

__all__ = [
    "NonFiniteLogits",
    "distillation_loss",
    "divergence",
    "forward_kl",
    "importance",
    "jsd",
    "kl",
    "linear_distillation_loss",
    "reverse_kl",
    "sampled_reverse_kl",
]
