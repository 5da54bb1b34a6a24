"""Policy gradients: advantages from the teachers' log-probabilities and from rewards, and the loss that they enter."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_opd.config.section import Fraction, NotNegative, bound, section


@section
class PolicyConfig:
    """The policy gradient: -A log q of every sampled token y, A = rl.weight x reward's advantage + kl_coef x teachers'.
    The term exists when one of the two factors is above 0."""

    loss: Literal["importance", "ppo", "cispo"] = "importance"
    """Form of the loss. With r = q(y) / μ(y), μ the sampler at rollout.temperature: importance is -w A log q, w =
    min(r, importance_cap) held fixed; cispo is the same with w = clip(r); ppo is -min(r A, clip(r) A), and
    dual_clip."""
    importance_cap: Annotated[float, bound(ge=1, why="fresh samples have ratio 1")] = 10.0
    """Largest ratio r (importance); larger ones are cut."""
    clip_low: Fraction = 0.2
    """Distance below 1 at which ratios are clipped: at 1 - clip_low (ppo, cispo)."""
    clip_high: NotNegative = 0.2
    """Distance above 1 at which ratios are clipped: at 1 + clip_high (ppo, cispo)."""
    dual_clip: float = 0.0
    """Limit of the loss of tokens with A < 0: at most dual_clip x |A| (ppo). 0: no limit; otherwise above 1, usually
    3."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"] = "token-mean"
    """Mean over tokens of this term; the same choices as loss.aggregation."""
    kl_coef: NotNegative = 0.0
    """Factor of the teachers' advantage, which is made of x = log p(y) - log μ(y) as the next settings say; 0: none."""
    kl_clip: NotNegative = 0.0
    """Largest |x|; larger ones are clipped before anything else. 0: no limit."""
    kl_discount: Fraction = 0.0
    """Discount γ of the sum over the rest of the answer, Σ_k γ^k x_(t+k); 0: the token's own x alone; 1: all alike."""
    kl_from: Literal["token", "next"] = "token"
    """Start of that sum: token (the token itself), or next (the one behind it; the token's own x is then left to the
    exact divergence of loss.kind distribution)."""
    kl_length_norm: bool = False
    """Divide the sum by its number of tokens."""
    kl_whiten: bool = False
    """Scale the result to mean 0 and standard deviation 1 over all tokens of the step."""


@section
class RLConfig:
    """Reinforcement learning from the rewards of data.train. Advantages are relative to the answers of one prompt."""

    weight: NotNegative = 0.0
    """Factor of the rewards' advantage; 0: no reinforcement learning."""
    baseline: Literal["group", "none"] = "group"
    """Baseline that is subtracted from a reward: the mean reward of the prompt's answers (group), or none."""
    normalise: bool = True
    """Divide by the standard deviation of the rewards of the prompt's answers (baseline group)."""
    distill_on: Literal["all", "wrong", "unsolved"] = "all"
    """Answers with the distillation term: all; wrong (a reward below 1); or unsolved (the prompt has no answer with
    reward 1)."""

    @property
    def needs_rewards(self) -> bool:
        """Whether training answers are graded."""
        return self.weight > 0 or self.distill_on != "all"


def has_policy_gradient(policy: PolicyConfig, rl: RLConfig) -> bool:
    """Whether sampled tokens get advantages."""
    return rl.weight > 0 or policy.kl_coef > 0
