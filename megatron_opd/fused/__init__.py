"""The fused distillation loss: value, gradient and metrics of every token in as few looks at memory as there can be.

`distillation_loss` (logits) and `linear_distillation_loss` (hidden states and heads) are for anybody; `run` on a
`Problem` is what they, and the student's step, stand on.
"""

from megatron_opd.fused import backends
from megatron_opd.fused.api import NonFiniteLogits, distillation_loss, linear_distillation_loss
from megatron_opd.fused.chunks import Gradients, Linear, Logits, Problem, run
from megatron_opd.fused.layout import Asked
from megatron_opd.fused.outcome import Outcome

__all__ = [
    "Asked",
    "Gradients",
    "Linear",
    "Logits",
    "NonFiniteLogits",
    "Outcome",
    "Problem",
    "backends",
    "distillation_loss",
    "linear_distillation_loss",
    "run",
]
