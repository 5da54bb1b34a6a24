"""Gradients of an fp16 student that fp16 itself does not know: made for the loss scale, before they are rounded."""

from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.scores import Hidden
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.fused import FactoredLogits
from megatron_opd.loss.objective import Objective

NUM_TOKENS, COLUMNS, D = 7, 40, 16
SHARE = 1e-9
"""Of each token in a mean over many: the gradient of its logits is far below fp16's smallest number."""
SCALE = 2.0**30


@dataclass
class Made:
    batch: MicroBatch
    hidden: torch.Tensor
    head: torch.Tensor
    objective: Objective
    target: torch.Tensor

    def student(self, upstream):
        """Leaves of the graph, the head with the memory that Megatron sums its gradient in."""
        hidden, head = self.hidden.clone().requires_grad_(), self.head.clone().requires_grad_()
        head.main_grad = torch.zeros(head.shape)
        return FactoredLogits(hidden, head, upstream)

    def dense(self):
        """Gradients of hidden states and head, float64."""
        logits = self.hidden.double() @ self.head.double().T
        _, grad = oracle.grad(
            lambda z: SHARE * oracle.divergence(oracle.log_softmax(z, COLUMNS), self.target, 1.0), logits
        )
        return grad @ self.head.double(), grad.T @ self.hidden.double()


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(3)
    hidden, theirs = (torch.randn(NUM_TOKENS, D, generator=generator).half() for _ in range(2))
    head, their_head = (torch.randn(COLUMNS, D, generator=generator).mul(0.5).half() for _ in range(2))
    ids = torch.randint(0, COLUMNS, (NUM_TOKENS,), generator=generator)
    weights, share = torch.ones(NUM_TOKENS, 1), torch.full((NUM_TOKENS,), SHARE)
    batch = tiny.micro_batch(ids, torch.zeros(NUM_TOKENS), weights, (Hidden(theirs),), weights_T={"distill": share})
    vocab = VocabShard(0, COLUMNS, COLUMNS)
    term = Distillation(LossConfig(beta=1.0), 1.0, vocab, (TeacherConfig(name="t", model="m"),), (their_head,))
    target = oracle.log_softmax(theirs.double() @ their_head.double().T, COLUMNS)
    return Made(batch, hidden, head, Objective(term), target)


def test_small_gradients_are_there_when_the_loss_is_scaled(made):
    student = made.student(SCALE)
    loss, _, _ = made.objective(made.batch, student)
    assert loss.item() == pytest.approx(
        SHARE * oracle.divergence(oracle.log_softmax(made.hidden.double() @ made.head.double().T, COLUMNS),
                                  made.target, 1.0).sum().item(),
        rel=1e-2,
    )  # fmt: skip
    (loss * SCALE).backward()
    hidden, head = made.dense()
    assert float((student.hidden_TD.grad.double() / SCALE - hidden).norm() / hidden.norm()) < 5e-3
    assert float((student.head_LD.main_grad.double() / SCALE - head).norm() / head.norm()) < 5e-3
    assert student.head_LD.grad is None


def test_without_a_scale_they_are_lost(made):
    """What the scale is for: of these numbers fp16 has none."""
    student = made.student(1.0)
    made.objective(made.batch, student)[0].backward()
    hidden, _ = made.dense()
    assert hidden.abs().max() > 0
    assert student.hidden_TD.grad.abs().max() == 0


def test_a_scale_that_is_not_the_one_of_the_backward_pass_is_noticed(made):
    loss, _, _ = made.objective(made.batch, made.student(SCALE))
    with pytest.raises(RuntimeError, match="another upstream factor"):
        loss.backward()


def test_a_fused_adam_that_never_stepped_gets_its_state_from_megatron():
    """Not so torch's, whose steps Megatron's function does not know."""
    from megatron_opd.student import cpu

    cpu.enable()
    from megatron_opd.student import optim

    filled = []
    weight = torch.nn.Parameter(torch.ones(3))
    parts = [
        SimpleNamespace(optimizer=adam, config="c", init_state_fn=lambda adam, config: filled.append((adam, config)))
        for adam in ("fused", torch.optim.AdamW([weight]), None)
    ]
    optim.complete_state(SimpleNamespace(chained_optimizers=parts))
    assert filled == [("fused", "c")]
    assert parts[1].optimizer.state[weight].keys() == {"exp_avg", "exp_avg_sq", "step"}
