"""The fused distillation loss: value, gradient and metrics of every token in as few looks at memory as there can be.

`distillation_loss` (logits) and `linear_distillation_loss` (hidden states and heads) are for anybody; `loss_of` is what
they and the student's step call.
"""

from megatron_opd.loss.fused import backends
from megatron_opd.loss.fused.api import NonFiniteLogits, distillation_loss, linear_distillation_loss
from megatron_opd.loss.fused.chunks import FactoredLogits, Gradients, Logits, Problem, run
from megatron_opd.loss.fused.differentiable import WeightedSum, in_graph, loss_of
from megatron_opd.loss.fused.statistics import LossSpec
from megatron_opd.loss.fused.token_results import TokenResults

__all__ = [
    "FactoredLogits",
    "Gradients",
    "Logits",
    "LossSpec",
    "NonFiniteLogits",
    "Problem",
    "TokenResults",
    "WeightedSum",
    "backends",
    "distillation_loss",
    "in_graph",
    "linear_distillation_loss",
    "loss_of",
    "run",
]
