"""How answers are drawn, from the settings."""

from __future__ import annotations

from megatron_opd.config import LossConfig, RolloutConfig
from megatron_opd.core.types import Sampling


def greedy(rollout: RolloutConfig) -> Sampling:
    """One answer a prompt, the likeliest token each time."""
    return Sampling(max_new_tokens=rollout.max_new_tokens, temperature=0.0)


def drawn(rollout: RolloutConfig, *, samples: int, seed: int) -> Sampling:
    """`samples` answers a prompt, drawn as training draws them."""
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        samples_per_prompt=samples,
        seed=seed,
    )


def notes(rollout: RolloutConfig, loss: LossConfig) -> list[str]:
    """Lines for the user: what corrects for an engine that computes in another type than float32."""
    if rollout.dtype == "fp32":
        return []
    exact = "the divergence is exact at every token, on answers of the rounded model"
    weighted = f"tokens are weighted by q/μ up to loss.importance_cap ({loss.importance_cap})"
    told = weighted if loss.kind == "sampled" else exact
    return [f"rollout.dtype {rollout.dtype}: {told}; mismatch/kl is the distance between the two models"]
