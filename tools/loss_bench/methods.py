"""The loss by us and by others, each as a function of the same inputs that runs forward and backward.

Others are used where they are installed, in the way that their documentation shows: TRL's GKD loss on logits and its
chunked loss on hidden states, Liger's fused linear JSD. None of them averages teachers, so they get one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_opd.loss.fused import distillation_loss, linear_distillation_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass(frozen=True)
class Shape:
    """What is measured. d_student and d_teacher are for the hidden-state form."""

    tokens: int
    vocabulary: int
    d_student: int = 256
    d_teacher: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    num_teachers: int = 1
    ensemble: str = "logits"
    beta: float = 0.0
    masked: bool = False
    """Half of the tokens do not count (hidden-state form)."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def random(self, *size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.empty(size, dtype=self.torch_dtype, device=self.device)
        for part in made.split(1024):  # not all of it in float32 at once
            part.copy_(torch.randn(part.shape, generator=generator, device=self.device).mul_(scale))
        return made


class _LayerOutput(torch.autograd.Function):
    """Logits as a layer makes them: not a leaf, nor a view of one, whose value would have to stay."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros((), dtype=torch.float32), None


def logits_call(method: str, shape: Shape) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(fresh student logits, work with them) of a method on logits."""
    student = shape.random(shape.tokens, shape.vocabulary, seed=0, scale=2.0)
    teachers = [shape.random(shape.tokens, shape.vocabulary, seed=n + 1, scale=2.0) for n in range(shape.num_teachers)]

    def prepare() -> torch.Tensor:
        return _LayerOutput.apply(torch.zeros((), requires_grad=True), student)

    def work(logits: torch.Tensor) -> None:
        LOGITS[method](logits, teachers, shape).backward()

    return prepare, work


def linear_call(method: str, shape: Shape) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(fresh gradients, work) of a method on hidden states and heads."""
    h = shape.random(shape.tokens, shape.d_student, seed=0).requires_grad_()
    head = shape.random(shape.vocabulary, shape.d_student, seed=1, scale=2 / shape.d_student**0.5).requires_grad_()
    teachers = [
        (
            shape.random(shape.tokens, shape.d_teacher, seed=2 * n + 2),
            shape.random(shape.vocabulary, shape.d_teacher, seed=2 * n + 3, scale=2 / shape.d_teacher**0.5),
        )
        for n in range(shape.num_teachers)
    ]
    mask = torch.ones(shape.tokens, dtype=torch.bool, device=shape.device)
    mask[::2] = not shape.masked

    def prepare() -> None:
        h.grad = head.grad = None

    def work(_: None) -> None:
        made = LINEAR[method](h, head, teachers, mask, shape)
        if made is not None:
            made.backward()

    return prepare, work


def _ours(logits: torch.Tensor, teachers: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    return distillation_loss(logits, teachers, beta=shape.beta, ensemble=shape.ensemble)


def _plain(logits: torch.Tensor, teachers: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    """What one would write down: float32, log-softmax, autograd."""
    logq, logp = F.log_softmax(logits.float(), -1), F.log_softmax(teachers[0].float(), -1)
    if shape.beta == 0:
        return F.kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()
    if shape.beta == 1:
        return F.kl_div(logp, logq, log_target=True, reduction="none").sum(-1).mean()
    logm = torch.logaddexp(logp + math.log(shape.beta), logq + math.log1p(-shape.beta))
    p_side = F.kl_div(logm, logp, log_target=True, reduction="none").sum(-1)
    q_side = F.kl_div(logm, logq, log_target=True, reduction="none").sum(-1)
    return (shape.beta * p_side + (1 - shape.beta) * q_side).mean()


def _trl_gkd(logits: torch.Tensor, teachers: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(logits, teachers[0], beta=shape.beta)


def _ours_linear(h: Any, head: Any, teachers: Any, mask: Any, shape: Shape) -> torch.Tensor:
    return linear_distillation_loss(h, head, teachers, mask=mask, beta=shape.beta, ensemble=shape.ensemble)


def _plain_linear(h: Any, head: Any, teachers: Any, mask: Any, shape: Shape) -> torch.Tensor:
    (teacher_h, teacher_head), *_ = teachers
    return _plain((h @ head.T)[mask], [(teacher_h @ teacher_head.T)[mask]], shape)


def _trl_linear(h: Any, head: Any, teachers: Any, mask: Any, shape: Shape) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    (teacher_h, teacher_head), *_ = teachers
    if not bool(mask.all()):  # as its trainer does
        h, teacher_h = h[mask], teacher_h[mask]
    return ChunkedDivergenceFunction.apply(h, head, None, teacher_h, teacher_head, None, shape.beta)[0].mean()


def _liger_linear(compiled: bool) -> Callable[..., torch.Tensor]:
    def work(h: Any, head: Any, teachers: Any, mask: Any, shape: Shape) -> torch.Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=shape.beta, compiled=compiled)
        (teacher_h, teacher_head), *_ = teachers
        labels = torch.where(mask, 0, -100)
        return loss(h, head, teacher_h, teacher_head, labels)

    return work


def _bare_products(h: Any, head: Any, teachers: Any, mask: Any, shape: Shape) -> None:
    """The matrix products that no method can do without, a chunk at a time, into buffers that are there."""
    size = min(256 if shape.device == "cpu" else 1024, shape.tokens)
    (teacher_h, teacher_head), *_ = teachers
    with torch.no_grad():
        z, t = h.new_empty(size, len(head)), h.new_empty(size, len(head))
        grad_h, grad_head = torch.empty_like(h), torch.zeros_like(head)
        for start in range(0, len(h), size):
            part = h[start : start + size]
            torch.mm(part, head.T, out=z[: len(part)])
            torch.mm(teacher_h[start : start + size], teacher_head.T, out=t[: len(part)])
            torch.mm(z[: len(part)], head, out=grad_h[start : start + size])
            grad_head.addmm_(z[: len(part)].T, part)


LOGITS: dict[str, Callable[..., torch.Tensor]] = {"ours": _ours, "plain": _plain, "TRL GKD": _trl_gkd}
LINEAR: dict[str, Callable[..., torch.Tensor | None]] = {
    "ours": _ours_linear,
    "plain": _plain_linear,
    "TRL chunked": _trl_linear,
    "Liger": _liger_linear(compiled=False),
    "Liger compiled": _liger_linear(compiled=True),
    "bare products": _bare_products,
}


def missing() -> dict[str, str]:
    """Why a method of others cannot be had, by name."""
    why = {}
    for method, module in {
        "TRL GKD": "trl.experimental.gkd.gkd_trainer",
        "TRL chunked": "trl.kernels.chunked_divergence",
        "Liger": "liger_kernel.chunked_loss",
        "Liger compiled": "liger_kernel.chunked_loss",
    }.items():
        try:
            __import__(module)
        except ImportError as error:
            why[method] = f"needs a package that is not installed: {error}"
    return why
