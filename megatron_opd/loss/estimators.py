"""Reverse KL from the sampled token alone as an ordinary loss, [T] log-probabilities of the token -> nats [T].

With l = log p(y) - log q(y), y ~ q: KL(q || p) = E[-l] (k1) = E[e^l - 1 - l] (k3), and near 0 also E[l^2 / 2] (k2); the
names are Schulman's, "Approximating KL Divergence" (2020). A good estimate of the value need not be a good loss: y is
drawn from q, so the gradient of the estimate is not an estimate of the gradient.

    loss        gradient          its mean over y ~ q
    k1 = -l     ∇log q            0: the teacher is not in it, so `config/retired.py` refuses it
    k2          -l ∇log q         that of KL(q || p), exactly; token by token it is `losses.sampled_reverse_kl`'s
    k3          (1 - e^l) ∇log q  that of KL(p || q): -sum_v p_v ∇log q_v

k2 is the default of KDRL (arXiv:2506.02208); Tang and Munos, arXiv:2506.09477, on the gradients. `weight_T` are
importance weights, constants.
"""

from __future__ import annotations

import torch


def k2(student_T: torch.Tensor, target_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """w (log p - log q)^2 / 2."""
    return weight_T * (target_T - student_T) ** 2 / 2


def k3(student_T: torch.Tensor, target_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """w (p / q - 1 - log(p / q)), never negative."""
    lead_T = target_T - student_T
    return weight_T * (torch.expm1(lead_T) - lead_T)
