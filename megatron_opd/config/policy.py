"""Policy gradients: advantages from the teachers' log-probabilities and from rewards, and the loss that they enter."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_opd.config.section import Fraction, NotNegative, bound, section


@section
class PolicyConfig:
    """The policy gradient: -A log q of every sampled token y, A = rl.weight x reward's advantage + kl_coef x teachers'.
    The term is on where one of the two factors is above 0."""

    loss: Literal["importance", "ppo", "cispo"] = "importance"
    """With r = q(y) / μ(y), μ the sampler at rollout.temperature. importance: -w A log q, w = min(r, importance_cap)
    held fixed; cispo: the same with w = clip(r); ppo: -min(r A, clip(r) A), and dual_clip."""
    importance_cap: Annotated[float, bound(ge=1, why="fresh samples have ratio 1")] = 10.0
    """Largest ratio r of the loss importance; larger ones are cut."""
    clip_low: Fraction = 0.2
    """Ratios are clipped at 1 - clip_low from below (ppo, cispo)."""
    clip_high: NotNegative = 0.2
    """Ratios are clipped at 1 + clip_high from above (ppo, cispo)."""
    dual_clip: float = 0.0
    """Tokens with A < 0 lose at most dual_clip x |A| (ppo); 0: no such limit, else above 1, usually 3."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"] = "token-mean"
    """How tokens make one number; as loss.aggregation, for this term."""
    kl_coef: NotNegative = 0.0
    """Factor of the teachers' advantage, made of x = log p(y) - log μ(y); 0: none. What follows is about x."""
    kl_clip: NotNegative = 0.0
    """x is clipped to [-kl_clip, kl_clip] first; 0: not clipped."""
    kl_discount: Fraction = 0.0
    """Discount γ of the sum over the rest of the answer, Σ_k γ^k x_(t+k); 0: the token's own x alone; 1: all alike."""
    kl_from: Literal["token", "next"] = "token"
    """Where that sum begins: at the token itself, or at the next one, which leaves the token's own x to the exact
    divergence of loss.kind distribution."""
    kl_length_norm: bool = False
    """Divide the sum by the number of tokens that it is over."""
    kl_whiten: bool = False
    """Make mean 0 and standard deviation 1 of the result, over all tokens of the step."""


@section
class RLConfig:
    """Reinforcement learning from the rewards of data.train. Advantages are relative to the answers of one prompt."""

    weight: NotNegative = 0.0
    """Factor of the rewards' advantage; 0: no reinforcement learning."""
    baseline: Literal["group", "none"] = "group"
    """Subtract the mean reward of the prompt's answers (group), or nothing (none)."""
    normalise: bool = True
    """Divide by the standard deviation of the rewards of the prompt's answers (baseline group)."""
    distill_on: Literal["all", "wrong", "unsolved"] = "all"
    """Which answers the distillation term is on: all; wrong: those with a reward below 1; unsolved: those of prompts
    without any answer of reward 1."""

    @property
    def needs_rewards(self) -> bool:
        """Whether training answers are graded."""
        return self.weight > 0 or self.distill_on != "all"


def has_policy_gradient(policy: PolicyConfig, rl: RLConfig) -> bool:
    """Whether sampled tokens get advantages."""
    return rl.weight > 0 or policy.kl_coef > 0
