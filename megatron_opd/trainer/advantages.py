"""Advantages of sampled tokens, from the teachers' log-probabilities and from rewards. Pure functions, no gradients.

Learnt tokens come flat, one sequence behind the other, with the number of each token's sequence: prompt, padding and
what something else wrote are not there, so nothing can land on them, and "the next token" is the next learnt one. The
advantage from teachers begins with x = log p(y) - log mu(y), mu the sampler: minus the k1 estimate of the reverse KL
(Lu and Thinking Machines Lab, "On-Policy Distillation", 2025).

Shape suffixes: T learnt tokens, R episodes, B sequences, S most learnt tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

import torch

from megatron_opd.config import PolicyConfig, RLConfig


def returns(x_T: torch.Tensor, sequence_T: torch.Tensor, discount: float) -> torch.Tensor:
    """G_t = sum_k discount^k x_(t+k) to the end of the token's sequence. The power counts from the token."""
    if discount == 0:
        return x_T
    x_BS, here_BS = _by_sequence(x_T, sequence_T)
    rest_B = x_BS.new_zeros(len(x_BS))
    for s in reversed(range(x_BS.shape[1])):
        rest_B = x_BS[:, s] = x_BS[:, s] + discount * rest_B
    return x_BS[here_BS]


def remaining(sequence_T: torch.Tensor) -> torch.Tensor:
    """How many tokens of its sequence there are from each token on, itself included."""
    ones_T = torch.ones_like(sequence_T, dtype=torch.float64)
    return returns(ones_T, sequence_T, 1.0)


def next_in_sequence(x_T: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """The value at the next token of the sequence; 0 at its last."""
    following_T = torch.zeros_like(x_T)
    following_T[:-1] = x_T[1:] * (sequence_T[1:] == sequence_T[:-1])
    return following_T


def from_teachers(
    logp_T: torch.Tensor, behaviour_T: torch.Tensor, sequence_T: torch.Tensor, how: PolicyConfig
) -> torch.Tensor:
    """The advantages that `policy.kl_…` describe, but for `kl_whiten` and `kl_coef`; float64.

    With discount 1, length norm and "next" it is R_(t+1) / (number of tokens after t), the long-horizon part of MiniLLM
    (Gu et al., arXiv:2306.08543, section 2.2), whose single-step part is the exact divergence.
    """
    x_T = logp_T.double() - behaviour_T.double()
    if how.kl_clip:
        x_T = x_T.clamp(-how.kl_clip, how.kl_clip)
    advantage_T = returns(x_T, sequence_T, how.kl_discount)
    if how.kl_length_norm:
        advantage_T = advantage_T / remaining(sequence_T)
    return next_in_sequence(advantage_T, sequence_T) if how.kl_from == "next" else advantage_T


def from_rewards(rewards_R: Sequence[float], groups_R: Sequence[Hashable], how: RLConfig) -> list[float]:
    """The advantage of each episode among those of its group, which have the same prompt.

    r - mean(r), over the sample standard deviation with `normalise`: GRPO (Shao et al., arXiv:2402.03300); without it,
    Dr. GRPO (Liu et al., arXiv:2503.20783). Groups of equal rewards get 0.
    """
    if how.baseline == "none":
        return list(rewards_R)
    found = list(rewards_R)
    for members in members_by_group(groups_R):
        its = [rewards_R[i] for i in members]
        mean = fmean(its)
        scale = stdev(its) if how.normalise and len(its) > 1 else 1.0
        for i in members:
            found[i] = (rewards_R[i] - mean) / scale if scale and max(its) > min(its) else 0.0
    return found


def distills(rewards_R: Sequence[float], groups_R: Sequence[Hashable], how: RLConfig) -> list[bool]:
    """Whether the distillation term is on the episode, by `rl.distill_on`: the masks of KDRL (arXiv:2506.02208) by
    response (wrong) and by group (unsolved)."""
    wrong = [reward < 1 for reward in rewards_R]
    if how.distill_on == "wrong":
        return wrong
    keep = [True] * len(wrong)
    if how.distill_on == "unsolved":
        for members in members_by_group(groups_R):
            for i in members:
                keep[i] = all(wrong[j] for j in members)
    return keep


def members_by_group(groups_R: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each group, in order."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups_R):
        members.setdefault(group, []).append(i)
    return list(members.values())


def annealed(weight: float, *, by: float, least: float, step: int) -> float:
    """max(weight - by * step, least), step from 0: the schedule of KDRL (arXiv:2506.02208)."""
    return max(weight - by * step, least) if by else weight


def shares(lengths_R: Sequence[int], *, how: str, tokens: int, episodes: int) -> list[float]:
    """The factor of an episode's tokens with which a sum over tokens, divided by `tokens`, is what `how` says.

    `lengths_R` are the tokens of episodes; `tokens` and `episodes` are the numbers of an update on all replicas.
    """
    if how == "seq-mean-token-mean":
        return [tokens / (episodes * max(length, 1)) for length in lengths_R]
    factor = {"token-mean": 1.0, "seq-mean-token-sum": tokens / max(episodes, 1), "sum": float(tokens)}[how]
    return [factor] * len(lengths_R)


def _by_sequence(x_T: torch.Tensor, sequence_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] with zeros behind the sequences, where they are)."""
    lengths_B = torch.unique_consecutive(sequence_T, return_counts=True)[1]
    longest = int(lengths_B.max()) if len(lengths_B) else 0
    here_BS = torch.arange(longest, device=x_T.device) < lengths_B[:, None]
    x_BS = x_T.new_zeros(here_BS.shape)
    x_BS[here_BS] = x_T
    return x_BS, here_BS
