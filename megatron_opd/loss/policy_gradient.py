"""The policy gradient of sampled tokens, from log-probabilities [T] under the policy and the sampler to a loss [T].

With r = q(y) / mu(y), the policy over the sampler, both at the sampler's temperature, and the advantage A, a constant:

    importance  -min(r, cap) A        gradient -min(r, cap) A d(log q)
    ppo         -min(r A, clip(r) A)  its own gradient: none where the clipped one is the smaller
    cispo       -clip(r) A            gradient -clip(r) A d(log q)

clip is to [1 - low, 1 + high]. With a cap that nothing reaches, importance is the loss importance_sampling of Tinker;
truncation as in Ionides 2008. PPO: Schulman et al., arXiv:1707.06347; unequal bounds as in DAPO, arXiv:2503.14476; with
`dual_clip` c, tokens of A < 0 lose at most -c A (Ye et al., arXiv:1912.09729). CISPO: MiniMax-M1, arXiv:2506.13585.
All are homogeneous in A, so a token's share in a mean can be a factor of its advantage.
"""

from __future__ import annotations

import torch

from megatron_opd.config import PolicyConfig

_MAX_LOG_RATIO = 20.0
"""A larger ratio counts as this one, and pushes no more: no infinity meets an advantage of 0."""


def policy_gradient(
    logp_T: torch.Tensor, behaviour_T: torch.Tensor, advantage_T: torch.Tensor, how: PolicyConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ratio, where the ratio was cut as bool), each [T]; only the loss has a gradient."""
    ratio_T = (logp_T - behaviour_T).clamp(max=_MAX_LOG_RATIO).exp()
    known_T = ratio_T.detach()
    if how.loss == "ppo":
        loss_T, cut_T = _ppo(ratio_T, advantage_T, how)
        return loss_T, known_T, cut_T
    if how.loss == "cispo":
        weight_T = known_T.clamp(1 - how.clip_low, 1 + how.clip_high)
    else:
        weight_T = known_T.clamp(max=how.importance_cap)
    value_T = -weight_T * advantage_T
    return value_T * (1 + (logp_T - logp_T.detach())), known_T, weight_T != known_T


def _ppo(ratio_T: torch.Tensor, advantage_T: torch.Tensor, how: PolicyConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, where it is not -r A)."""
    plain_T = -ratio_T * advantage_T
    clipped_T = -ratio_T.clamp(1 - how.clip_low, 1 + how.clip_high) * advantage_T
    loss_T = torch.maximum(plain_T, clipped_T)
    if how.dual_clip:
        loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -how.dual_clip * advantage_T), loss_T)
    return loss_T, loss_T != plain_T
